"""The files of tests that take more than ten seconds of a processor, or wait long: the longest first."""

FILES = """
    kernels/test_ptx.py kernels/test_attention.py kernels/test_guidance.py batch/test_batch.py
    batch/test_distributed.py kernels/test_compile.py test_compile.py test_surroundings.py training/test_training.py
    kernels/test_keys.py kernels/test_attention_backward.py test_examination.py test_prepared.py
    viewer/test_browser.py benchmarks/test_gpu.py test_packaging.py faults/test_faults.py plain/test_forward.py
    test_export.py test_module.py cpu/test_pages.py cli/test_cli.py kernels/test_queries.py plain/test_gradients.py
    test_published.py ops/test_choice.py plain/test_width.py kernels/test_launches.py encoders/test_families.py
    kernels/test_unification_backward.py plain/test_elsewhere.py benchmarks/test_forward.py
    kernels/test_unification.py kernels/test_ptx_machine.py benchmarks/test_ledger.py
""".split()
