"""Wheel, sdist and editable install, made without network and used from another directory."""

import fnmatch
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from functools import cache
from pathlib import Path

import pytest
from tree import ROOT, project_files

MAX_WHEEL_BYTES = 6_000_000
DATA = (
    "anyup_fast/viewer/*.css",
    "anyup_fast/viewer/*.html",
    "anyup_fast/viewer/*.js",
    "anyup_fast/weights/*.safetensors",
    "anyup_fast/weights/*.md",
    "kernels/tuned/*.json",
)

# From the sdist pip builds the wheel once more: its contents are compared by default.
KINDS = ("wheel", pytest.param("sdist", marks=pytest.mark.slow("pip builds the wheel once more")), "editable")

# Run by the interpreter of an installation; both print what they find as JSON.
PROBE = """
import importlib.metadata, importlib.util, json, os, sys
import anyup_fast
found = {"after_import": sorted({name.split(".")[0] for name in sys.modules})}
import anyup_fast.kernels
import anyup_fast.weights
found["version"] = anyup_fast.__version__
found["metadata"] = importlib.metadata.version("anyup-fast")
found["files"] = [anyup_fast.__file__, anyup_fast.kernels.__file__]
found["weights"] = sorted(os.listdir(os.path.dirname(anyup_fast.weights.__file__)))
bare = importlib.util.find_spec("kernels")
found["bare_kernels"] = bare and bare.origin
print(json.dumps(found))
"""
PUBLIC_NAMES = """
import json
import anyup_fast
print(json.dumps({name: getattr(anyup_fast, name) is not None for name in anyup_fast.__all__}))
"""


def run(*command, cwd):
    """Output of a command that has to succeed; it sees no Python or pip variables and no package index."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_"))}
    environment |= {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "OMP_NUM_THREADS": "1"}
    command = [str(part) for part in command]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def expected_modules_and_data():
    """Names inside the wheel that the project's files lead to."""
    names = set()
    for path in map(Path.as_posix, project_files()):
        if path.startswith(("anyup_fast/", "kernels/")) and (
            path.endswith(".py") or any(fnmatch.fnmatch(path, pattern) for pattern in DATA)
        ):
            names.add(f"anyup_fast/{path}" if path.startswith("kernels/") else path)
    return names


def wheel_faults(names, expected):
    """Sentences about a wheel's list of names that is not what `expected` says, metadata aside."""
    inside = {name for name in names if not name.split("/")[0].endswith(".dist-info") and not name.endswith("/")}
    return [f"{name} is missing" for name in sorted(expected - inside)] + [
        f"{name} does not belong into the wheel" for name in sorted(inside - expected)
    ]


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """A copy of the project's files, so that building leaves nothing in the tree."""
    copy = tmp_path_factory.mktemp("packaging") / "source"
    for name in project_files():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="session")
def dist(source):
    """Folder with the wheel and the sdist, both built from the copy."""
    out = source.parent / "dist"
    command = [sys.executable, "-m", "build", "--no-isolation", "--sdist", "--wheel", "--outdir", out, source]
    run(*command, cwd=source.parent)
    return out


@pytest.fixture(scope="session")
def installed(source, dist):
    """Function: kind of installation -> (folder of its programs, folder that holds the package).

    Each kind gets an environment that sees the packages of the running one, but no anyup_fast installed
    there: of a path named in a .pth file the .pth files, an editable install's among them, are left alone.
    """

    @cache
    def install(kind):
        environment = source.parent / kind
        run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=source.parent)
        programs = environment / ("Scripts" if os.name == "nt" else "bin")
        ask = "import sysconfig; print(sysconfig.get_path('purelib'), end='')"
        site = Path(run(programs / "python", "-c", ask, cwd=source.parent))
        parents = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
        (site / "parents.pth").write_text("\n".join(parents), encoding="utf-8")
        if kind == "editable":
            home = source.parent / "checkout"
            shutil.copytree(source, home, ignore=shutil.ignore_patterns("build", "*.egg-info"))
            what = ["--editable", home]
        else:
            home = environment
            what = [next(dist.glob("*.whl" if kind == "wheel" else "*.tar.gz"))]
        pip = [sys.executable, "-m", "pip", "--python", programs / "python", "install", "--quiet"]
        run(*pip, "--no-deps", "--no-build-isolation", "--ignore-installed", *what, cwd=source.parent)
        return programs, home

    return install


@pytest.fixture(scope="session")
def probed(installed, tmp_path_factory):
    """Function: kind of installation -> what PROBE finds there."""

    @cache
    def probe(kind):
        programs, _ = installed(kind)
        return json.loads(run(programs / "python", "-c", PROBE, cwd=tmp_path_factory.mktemp("elsewhere")))

    return probe


def test_wheel_holds_the_package_and_nothing_else(dist):
    wheel = next(dist.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert wheel_faults(names, expected_modules_and_data()) == []
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert wheel.stat().st_size < MAX_WHEEL_BYTES


def test_wrong_wheels_are_caught():
    good = {
        "anyup_fast/__init__.py",
        "anyup_fast/kernels/__init__.py",
        "anyup_fast/weights/embedded.safetensors",
    }
    assert wheel_faults([*good, "anyup_fast-0.1.0.dist-info/METADATA"], good) == []
    assert wheel_faults([*good, "kernels/__init__.py"], good) == ["kernels/__init__.py does not belong into the wheel"]
    assert wheel_faults([*good, "tests/test_a.py"], good) == ["tests/test_a.py does not belong into the wheel"]
    assert wheel_faults(good - {"anyup_fast/kernels/__init__.py"}, good) == [
        "anyup_fast/kernels/__init__.py is missing"
    ]
    assert len(wheel_faults({"anyup_fast/__init__.py"}, good)) == 2


def test_sdist_holds_the_whole_project(dist):
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    wanted = {name.as_posix() for name in project_files()} - {".gitignore"}
    assert {"README.md", "LICENSE", "constraints.txt", "kernels/__init__.py", "tests/support/tree.py"} <= wanted
    assert wanted - names == set()
    strangers = {name for name in names - wanted if name.endswith((".py", ".pyc", ".pth", ".onnx"))}
    assert strangers == set()


@pytest.mark.parametrize("kind", KINDS)
def test_import_loads_nothing_heavy(probed, kind):
    loaded = probed(kind)["after_import"]
    heavy = {
        "PIL",
        "matplotlib",
        "onnx",
        "ray",
        "safetensors",
        "scipy",
        "skimage",
        "sklearn",
        "tqdm",
        "transformers",
        "triton",
    }
    assert "anyup_fast" in loaded
    assert heavy.isdisjoint(loaded)


@pytest.mark.parametrize("kind", KINDS)
def test_installed_package_is_its_own(installed, probed, kind):
    _, home = installed(kind)
    found = probed(kind)
    for path in found["files"]:
        assert Path(path).resolve().is_relative_to(home.resolve())
    assert found["bare_kernels"] is None or not Path(found["bare_kernels"]).is_relative_to(home)
    in_tree = {name.name for name in project_files() if name.parent.as_posix() == "anyup_fast/weights"}
    assert set(found["weights"]) - {"__pycache__"} == in_tree
    assert found["version"] == found["metadata"]


@pytest.mark.parametrize("kind", KINDS)
def test_public_names_resolve(installed, kind, tmp_path):
    programs, _ = installed(kind)
    names = json.loads(run(programs / "python", "-c", PUBLIC_NAMES, cwd=tmp_path))
    assert {"load_image", "upsample_features_with_anyup", "AnyUp"} <= set(names)
    assert all(names.values())


@pytest.mark.parametrize("kind", KINDS)
def test_program_runs_from_another_directory(installed, probed, kind, tmp_path):
    programs, _ = installed(kind)
    assert probed(kind)["metadata"] in run(programs / "anyup-fast", "--version", cwd=tmp_path).split()
    printed = run(programs / "anyup-fast", "--help", cwd=tmp_path)
    assert "usage" in printed.lower() and "demo" in printed and "upsample" in printed
    assert list(tmp_path.iterdir()) == []


def test_editable_install_finds_its_kernels_from_the_root_of_the_checkout(installed):
    programs, home = installed("editable")
    printed = run(programs / "python", "-c", "import anyup_fast.kernels as k; print(k.__file__)", cwd=home)
    assert Path(printed.strip()).resolve() == (home / "kernels" / "__init__.py").resolve()
