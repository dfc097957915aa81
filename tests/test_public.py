"""The names that other people's code and files rely on: they stay when files move."""

import argparse
import importlib.util
import inspect
import pickle
import pkgutil
from importlib import import_module

import pytest
import tiny
import torch
from tree import ROOT

import anyup_fast
from anyup_fast import cli, ops

NAMES = {
    "anyup_fast": (
        "AnyUp accelerate install_as_anyup extract_dinov2_features extract_features load_image prepare wrap_encoder "
        "upsample_features_with_anyup visualize_feature_comparison open batch fit_head prompt_head view"
    ),
    "anyup_fast.ops": (
        "Block GuidanceWeights KeyWeights backends branches choose_backend feature_unification guidance "
        "neighborhood_bounds pooled pooled_block project_keys project_pixels project_queries reference "
        "res_block use_backend use_precision why_not window_bounds windowed_attention"
    ),
    "anyup_fast.encoders": "Encoder list_encoders load_encoder wrap_encoder",
    "anyup_fast.batch": "Archive Settings Summary check_film make_film open_archive run",
    "anyup_fast.training": "TrainConfig TargetCache train",
    "anyup_fast.export": "export_onnx",
    "anyup_fast.plain.reference": "windowed_attention feature_unification",
    "anyup_fast.encoders.text": "TextEncoder",
    "anyup_fast.heads": "Head linear_head load_head read_head save_head",
    "anyup_fast.padded": "Padded",
    "anyup_fast.prepared": "Prepared",
    # former places, kept
    "anyup_fast.upsampling": "Prepared linear_head load_head",
    "anyup_fast.ops.pages": "release",
    "anyup_fast.ops.reference": "windowed_attention feature_unification",
}
OPERATORS = """
branches branches_backward convolve_and_project feature_unification feature_unification_backward guidance
neighborhood_bounds pooled pooled_backward pooled_block pooled_block_backward project_keys project_pixels
project_pixels_backward project_queries project_queries_backward res_block res_block_backward unit_channels
window_bounds windowed_attention windowed_attention_backward
"""
# What a pickle of a whole model names.
PICKLED = {
    "anyup_fast.model": "AnyUp CrossAttention CrossDecode",
    "anyup_fast.layers": "FeatureUnification GroupNorm RMSNorm ReflectConv2d ResBlock RotaryEmbedding",
}
ENTRY_POINTS = {"anyup", "anyup_multi_backbone", "anyup_embedded"}
OPTIONS = {
    "demo": "--compute-dtype --device --dtype --encoder --mode --out --precision --size --weights photo",
    "upsample": (
        "--as-stored --compute-dtype --device --dtype --encoder --figure --fit --head --labels --layer --mode --out "
        "--output-size --precision --region --resume --size --stream --tile --value-range --weights photo"
    ),
    "view": (
        "--as-stored --attention-step --compute-dtype --device --directions --encoder --fit --head --layer --max-bytes "
        "--out --precision --prompt --size --value-range --weights photos"
    ),
    "train": (
        "--all --batch --cache --camouflage-share --consistency-share --consistency-weight --crop "
        "--degraded-share --dense-weight --draws --ema --encoders --float32 --guide-pixels --init "
        "--large-share --lr --main-weight --mask-weight --max-cells --native-share --native-weight "
        "--noise-share --optimizer --out --pictures --plain-share --precision --recolour-share --region --save-every "
        "--scenes --seed --segment-weight --shapes-share --size --smooth-weight --spot-share --spread-weight "
        "--stamps --steps --threads --variety-share --warmup"
    ),
    "batch": (
        "--batch-size --compute-dtype --device --dtype --encoder --engine --film --format --head --kind --layer "
        "--output-size --overwrite --pages --pca --precision --rate --ray-address --size --verify --weights --workers "
        "--zarr-format input output"
    ),
    "fit-head": (
        "--C --classes --compute-dtype --device --encoder --held-out --ignore --kind --layer --masks --out --precision "
        "--prompts --samples --seed --size --weights pictures"
    ),
    "info": "",
}
ARGUMENTS = {
    "load_image": "source size patch_multiple max_pixels value_range upright fit",
    "extract_features": "image encoder layer weights device value_range",
    "extract_dinov2_features": "image model layer weights device value_range",
    "upsample_features_with_anyup": (
        "image features output_size weights device backend precision value_range dtype values"
    ),
    "prepare": "image features weights device backend precision value_range dtype values",
    "fit_head": "inputs targets kind classes encoder ignore samples seed C weights",
    "prompt_head": "encoder prompts classes templates device",
    "view": (
        "pictures encoder layer weights size fit value_range upright prompts head directions attention_step names "
        "title max_bytes device backend precision dtype"
    ),
    "visualize_feature_comparison": "image lr_features hr_features mode path value_range",
}


def home(name):
    """The module of a dotted name, or the object of a package that goes by it."""
    try:
        return import_module(name)
    except ModuleNotFoundError:
        package, _, last = name.rpartition(".")
        return getattr(import_module(package), last)


@pytest.mark.parametrize("module", NAMES)
def test_public_names(module):
    assert [name for name in NAMES[module].split() if not hasattr(home(module), name)] == []


@pytest.mark.parametrize("verb", ARGUMENTS)
def test_arguments_of_the_verbs(verb):
    given = [name for name in inspect.signature(getattr(anyup_fast, verb)).parameters]
    assert given == ARGUMENTS[verb].split()


def test_no_public_name_is_missing_from_the_list():
    assert {*NAMES["anyup_fast"].split()} >= {*anyup_fast.__all__} - {"__version__"}
    assert {*NAMES["anyup_fast.ops"].split()} == {*ops.__all__}


def test_registered_operators_keep_their_names():
    parts = [import_module(f"anyup_fast.ops.{part.name}") for part in pkgutil.iter_modules(ops.__path__)]
    made = {
        one._qualname for part in parts for one in vars(part).values() if isinstance(one, torch.library.CustomOpDef)
    }
    assert made == {f"anyup_fast::{name}" for name in OPERATORS.split()}


@pytest.mark.parametrize("module", PICKLED)
def test_pickles_find_their_classes(module):
    assert all(isinstance(getattr(import_module(module), name), type) for name in PICKLED[module].split())


def test_a_pickle_that_names_the_former_places_loads():
    model = tiny.model()
    pickled = pickle.dumps(model, protocol=2)
    moved = pickled.replace(b"canyup_fast.decoder\n", b"canyup_fast.model\n")
    assert moved != pickled, "the end of the model had its classes in anyup_fast.model"
    loaded = pickle.loads(moved)
    assert type(loaded) is type(model) and type(loaded.cross_decode) is type(model.cross_decode)
    given = torch.randn(1, 3, 8, 8), torch.randn(1, 5, 2, 2)
    assert torch.equal(loaded(*given), model(*given))


def test_entry_points_of_the_hub():
    spec = importlib.util.spec_from_file_location("hubconf", ROOT / "hubconf.py")
    hubconf = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hubconf)
    assert all(callable(getattr(hubconf, name, None)) for name in ENTRY_POINTS)


def commands():
    """Command to the set of its options and positional arguments."""
    (choices,) = (a.choices for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction))
    return {
        name: {option for action in parser._actions for option in action.option_strings or [action.dest]}
        for name, parser in choices.items()
    }


def test_commands_and_options():
    found = commands()
    assert set(found) >= set(OPTIONS)
    missing = {name: {*OPTIONS[name].split()} - found[name] for name in OPTIONS}
    assert {name: options for name, options in missing.items() if options} == {}
