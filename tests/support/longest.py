"""The files of tests that take more than five seconds of a processor, or wait long: the longest first."""

FILES = """
    kernels/test_ptx.py kernels/test_compile.py viewer/test_browser.py kernels/test_attention.py
    kernels/test_guidance.py batch/test_batch.py test_surroundings.py test_compile.py training/test_training.py
    test_prepared.py batch/test_distributed.py test_examination.py plain/test_forward.py test_export.py
    plain/test_width.py encoders/test_families.py plain/test_gradients.py test_packaging.py
    kernels/test_attention_backward.py faults/test_faults.py test_module.py examples/test_examples.py
    kernels/test_ptx_machine.py kernels/test_queries.py kernels/test_keys.py cli/test_cli.py benchmarks/test_gpu.py
    benchmarks/test_forward.py cpu/test_pages.py viewer/test_labelling.py test_acceleration.py
    kernels/test_unification_backward.py ops/test_choice.py test_hub.py test_published.py encoders/test_encoders.py
    kernels/test_launches.py
""".split()
