"""The order of the house: who may import whom, docstrings, and what may not lie in the tree.

Imports are read from the syntax trees, those inside functions too, so nothing here imports the package.
"""

import ast
import fnmatch
import importlib.util
import re
import sys
from pathlib import Path

import longest
import pytest
from tree import ROOT, project_files

# A part may import its own level and the levels below; files and weights serve everybody and need nobody.
LEVELS = [
    {"cli"},
    {"api", "batch", "fitting", "labelled", "training", "viewer"},
    {"acceleration", "examination", "export", "published"},
    {"recognition"},
    {"model"},
    {"frugal", "recording", "captured", "fused"},
    {"prepared", "upsampling"},
    {"parts"},
    {"decoder", "heads", "image", "masks", "rows", "encoders", "checkpoints", "stores", "visualize"},
    {"layers", "kept"},
    {"checks", "padded", "ranges", "ops"},
    {"plain"},
    {"cpu", "kernels"},
    {"pixels"},
    {"scales"},
    {"endings", "files", "formats", "logs", "weights"},
]
LEVEL = {part: level for level, parts in enumerate(LEVELS) for part in parts}
ONLY = {"kernels": "ops", "cpu": "plain"}  # parts that a single other part may import
MAX_LINES = 450  # of a file of the package
LEAVES = LEVELS[-1]
HEAVY = {
    "PIL",
    "av",
    "filelock",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "ray",
    "safetensors",
    "scipy",
    "skimage",
    "sklearn",
    "tqdm",
    "transformers",
    "triton",
    "zarr",
}
NEVER_AT_TOP = {"matplotlib", "triton"}
KERNELS_MAY_USE = {"torch", "triton", "numpy", *sys.stdlib_module_names}
MAX_TRACKED_BYTES = 4_000_000

DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def python_sources(*folders):
    return {
        name.as_posix(): (ROOT / name).read_text(encoding="utf-8")
        for name in project_files()
        if name.suffix == ".py" and name.parts[0] in folders
    }


def package_of(path):
    """Dotted package that the module at `path` is installed in, as a list."""
    parts = path.split("/")[:-1]
    return ["anyup_fast", *parts] if path.startswith("kernels/") else parts


def imports_of(path, source):
    """Everything that a file imports.

    Returns:
        list of (dotted absolute name, line, whether it waits for a call, whether it was written relatively).
        `from a import b` gives "a.b"; a literal handed to a function called something with "import" counts.
    """
    found = []

    def visit(node, lazy):
        if isinstance(node, ast.Import):
            found.extend((alias.name, node.lineno, lazy, False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = package_of(path)
            above = package[: len(package) - node.level + 1] if node.level else []
            base = [*above, *([node.module] if node.module else [])]
            for alias in node.names:
                found.append((".".join([*base, alias.name]), node.lineno, lazy, node.level > 0))
        elif isinstance(node, ast.Call) and node.args:
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            name = node.args[0]
            if isinstance(name, ast.JoinedStr) and name.values:
                name = name.values[0]
            if "import" in called and isinstance(name, ast.Constant) and isinstance(name.value, str):
                dots = len(name.value) - len(name.value.lstrip("."))
                package = package_of(path)
                above = package[: len(package) - dots + 1] if dots else []
                found.append((".".join([*above, name.value.strip(".")]), node.lineno, lazy, dots > 0))
        for child in ast.iter_child_nodes(node):
            visit(child, lazy or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))

    visit(ast.parse(source, path), False)
    return found


def public_homes(sources):
    """The table name -> module that anyup_fast/__init__.py resolves its public names by."""
    for node in ast.parse(sources["anyup_fast/__init__.py"]).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "_HOME_OF":
            return ast.literal_eval(node.value)
    return {}


def reached_at_import(sources):
    """Paths of the modules that `import anyup_fast` executes."""
    reached, waiting = set(), ["anyup_fast/__init__.py"]
    while waiting:
        path = waiting.pop()
        if path in reached or path not in sources:
            continue
        reached.add(path)
        for name, _, lazy, _ in imports_of(path, sources[path]):
            if lazy or not name.startswith("anyup_fast."):
                continue
            parts = name.removeprefix("anyup_fast.").split(".")
            parts = parts if parts[0] == "kernels" else ["anyup_fast", *parts]
            for depth in range(1, len(parts) + 1):
                stem = "/".join(parts[:depth])
                waiting += [f"{stem}.py", f"{stem}/__init__.py"]
    return reached


def import_faults(sources):
    """Sentences about the imports in `sources` ({path: source}) that break the order of the house."""
    faults = []
    homes = public_homes(sources)
    reached = reached_at_import(sources)
    for path, source in sources.items():
        in_kernels = path.startswith("kernels/")
        own = "kernels" if in_kernels else path.split("/")[1].removesuffix(".py")
        if own != "__init__" and own not in LEVEL:
            faults.append(f"{path}: {own!r} has no level: add it to LEVELS in tests/test_house.py")
            continue
        for name, line, lazy, relative in imports_of(path, source):
            where = f"{path}:{line}"
            top, *rest = name.split(".")
            if top == "kernels":
                faults.append(f"{where}: the top-level name 'kernels' belongs to another project")
            if in_kernels:
                if top not in KERNELS_MAY_USE and not (relative and rest[:1] == ["kernels"]):
                    faults.append(f"{where}: kernels import torch, triton, numpy and siblings, not {name}")
                continue
            if top in HEAVY and not lazy and (path in reached or top in NEVER_AT_TOP):
                faults.append(f"{where}: {top} has to be imported where it is used, not with the module")
            if top != "anyup_fast" or own == "__init__" or rest == ["__version__"]:
                continue
            part = homes.get(rest[0], rest[0]) if rest else "api"
            if part == own:
                continue
            if part not in LEVEL:
                faults.append(f"{where}: {name} is no part of the package")
            elif own in LEAVES:
                faults.append(f"{where}: {own} serves everybody and may not import {part}")
            elif own != ONLY.get(part, own):
                faults.append(f"{where}: only {ONLY[part]} may import {part}")
            elif LEVEL[part] < LEVEL[own]:
                faults.append(f"{where}: {own} lies below {part} and may not import it")
    return faults


def module_of(name, sources):
    """Path in `sources` of the module that the dotted name "anyup_fast.x.y" names or lies in; None for others."""
    if not name.startswith("anyup_fast."):
        return None
    parts = name.split(".")[1:]
    parts = parts if parts[0] == "kernels" else ["anyup_fast", *parts]
    for depth in range(len(parts), 0, -1):
        for path in ("/".join(parts[:depth]) + ".py", "/".join([*parts[:depth], "__init__.py"])):
            if path in sources and path != "anyup_fast/__init__.py":
                return path
    return None


def circles(sources):
    """Sentences that name modules which import each other in a circle, those imported inside functions included.

    A package's `__init__.py` hands on what its modules define, so a module of it that imports a sibling through the
    package is a circle as well.
    """
    wanted = {
        path: {module_of(name, sources) for name, *_ in imports_of(path, source)} - {None, path}
        for path, source in sources.items()
    }
    faults, done = [], set()

    def follow(path, trail):
        if path in trail:
            circle = trail[trail.index(path) :]
            faults.append(" -> ".join([*circle, path]))
            return
        if path in done:
            return
        for other in sorted(wanted.get(path, ())):
            follow(other, [*trail, path])
        done.add(path)

    for path in sorted(wanted):
        follow(path, [])
    return faults


def undocumented(sources):
    """Public functions, classes and methods in `sources` without a docstring.

    A method may be described where a base class declares it, and `forward` in the class's docstring.
    """
    described = {}
    for path, source in sources.items():
        for node in ast.walk(ast.parse(source, path)):
            if isinstance(node, ast.ClassDef):
                methods = {m.name for m in node.body if isinstance(m, DEFINITIONS[:2]) and ast.get_docstring(m)}
                described.setdefault(node.name, set()).update(methods)
    faults = []

    def visit(path, body, prefix, exempt):
        for node in body:
            if not isinstance(node, DEFINITIONS) or node.name.startswith("_"):
                continue
            if ast.get_docstring(node) is None and node.name not in exempt:
                faults.append(f"{path}:{node.lineno}: {prefix}{node.name} has no docstring")
            if isinstance(node, ast.ClassDef):
                bases = [getattr(base, "attr", getattr(base, "id", "")) for base in node.bases]
                elsewhere = {"forward"}.union(*(described.get(name, ()) for name in [node.name, *bases]))
                visit(path, node.body, f"{node.name}.", elsewhere)

    for path, source in sources.items():
        visit(path, ast.parse(source, path).body, "", ())
    return faults


MARKER = re.compile(r"^(<{7}|>{7}|\|{7})( |$)", re.M)
MACHINE_PATH = re.compile(r"(?<![\w.~/}$-])/(?:work|root|home|tmp|Users)/[\w.$~-]")


def text_faults(path, text):
    """Merge markers and absolute paths of somebody's machine in a text file."""
    faults = []
    for pattern, what in ((MARKER, "an unresolved merge marker"), (MACHINE_PATH, "a path of one machine")):
        for match in pattern.finditer(text):
            faults.append(f"{path}:{text.count(chr(10), 0, match.start()) + 1}: {what}")
    return faults


def test_imports_follow_the_order_of_the_house():
    sources = python_sources("anyup_fast", "kernels")
    assert len(sources) > 5 and "anyup_fast/ops/__init__.py" in sources and "kernels/__init__.py" in sources
    assert import_faults(sources) == []
    assert circles(sources) == []


def test_the_longest_files_of_tests_exist():
    assert [name for name in longest.FILES if not (ROOT / "tests" / name).is_file()] == []


def test_files_are_short():
    lengths = {path: source.count("\n") for path, source in python_sources("anyup_fast").items()}
    assert len(lengths) > 50
    assert {path: length for path, length in lengths.items() if length > MAX_LINES} == {}


def test_an_operator_has_one_name_in_every_place():
    """Whoever knows one file of an operator finds the others."""
    sources = python_sources("anyup_fast", "kernels")

    def names(folder, but):
        found = {path.rsplit("/", 1)[1].removesuffix(".py") for path in sources if path.rsplit("/", 1)[0] == folder}
        return {name.removesuffix("_backward") for name in found} - {"__init__", *but}

    operators = names("anyup_fast/ops", {"choice", "windows", "pages"})
    assert operators == {"attention", "guidance", "unification", "keys", "queries", "blocks"}
    assert operators <= names("anyup_fast/plain", ())
    assert names("kernels", {"tiling", "probe", "launches"}) <= operators


GOOD = {
    "anyup_fast/__init__.py": (
        "from importlib import import_module\n_HOME_OF = {'AnyUp': 'model'}\n"
        "def __getattr__(name):\n    return import_module(f'anyup_fast.{_HOME_OF[name]}')\n"
    ),
    "anyup_fast/cli.py": "from . import __version__, api\nfrom anyup_fast import AnyUp\n",
    "anyup_fast/model.py": (
        "import torch\nfrom .layers import ResBlock\nfrom .files import written_aside\n"
        "def load():\n    from safetensors.torch import load_file\n    from .checkpoints import read\n"
    ),
    "anyup_fast/ops/attention.py": "def launch():\n    from ..kernels import attention\n",
    "anyup_fast/encoders/hf.py": "from .base import Encoder\nfrom ..image import load\nimport transformers\n",
    "kernels/attention.py": "import math\nimport torch\nimport triton.language as tl\nfrom . import tiles\n",
}


def test_made_up_sources_in_order_pass():
    assert import_faults(GOOD) == []


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        ("anyup_fast/layers.py", "from .model import AnyUp", "layers lies below model"),
        (
            "anyup_fast/layers.py",
            "def f():\n    from anyup_fast.model import AnyUp",
            "layers lies below model",
        ),
        ("anyup_fast/layers.py", "def f():\n    from anyup_fast import AnyUp", "layers lies below model"),
        ("anyup_fast/model.py", "import anyup_fast", "model lies below api"),
        ("anyup_fast/model.py", "import anyup_fast.api", "model lies below api"),
        ("anyup_fast/model.py", "def f():\n    import_module('anyup_fast.api')", "model lies below api"),
        (
            "anyup_fast/model.py",
            "def f(n):\n    import_module(f'.api.{n}', __package__)",
            "model lies below api",
        ),
        ("anyup_fast/api.py", "from .cli import main", "api lies below cli"),
        ("anyup_fast/ops/guidance.py", "from ..model import AnyUp", "ops lies below model"),
        (
            "anyup_fast/model.py",
            "def f():\n    from .kernels import attention",
            "only ops may import kernels",
        ),
        ("anyup_fast/ops/attention.py", "from ..cpu import crew", "only plain may import cpu"),
        ("anyup_fast/cli.py", "def f():\n    optional_import('anyup_fast.kernels.attention')", "only ops"),
        ("anyup_fast/ops/attention.py", "from kernels import attention", "top-level name 'kernels'"),
        ("anyup_fast/files.py", "from .image import load_image", "files serves everybody"),
        ("anyup_fast/model.py", "from .nowhere import thing", "no part of the package"),
        ("anyup_fast/helpers.py", "import math", "has no level"),
        ("anyup_fast/ops/attention.py", "import triton", "triton has to be imported where it is used"),
        ("anyup_fast/visualize.py", "from matplotlib import pyplot", "matplotlib has to be imported where"),
        (
            "anyup_fast/__init__.py",
            GOOD["anyup_fast/__init__.py"] + "import PIL",
            "PIL has to be imported where it is used",
        ),
        ("kernels/attention.py", "from ..ops import windows", "kernels import torch, triton"),
        ("kernels/attention.py", "def f():\n    import anyup_fast.ops", "kernels import torch, triton"),
        ("kernels/attention.py", "from anyup_fast.kernels import tiles", "kernels import torch, triton"),
        ("kernels/attention.py", "import transformers", "kernels import torch, triton"),
    ],
)
def test_made_up_offences_are_caught(path, source, complaint):
    faults = import_faults({**GOOD, path: source})
    assert len(faults) == 1 and complaint in faults[0], faults


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"anyup_fast/checkpoints.py": "def check():\n    from .model import AnyUp\n"}, ["checkpoints.py", "model.py"]),
        ({"anyup_fast/encoders/base.py": "from . import hf\n"}, ["encoders/base.py", "encoders/hf.py"]),
        (
            {
                "anyup_fast/encoders/__init__.py": "from .hf import load\n",
                "anyup_fast/encoders/hf.py": "from . import x",
            },
            ["encoders/__init__.py", "encoders/hf.py"],
        ),
        ({"kernels/tiles.py": "from .attention import launch\n"}, ["kernels/attention.py", "kernels/tiles.py"]),
    ],
)
def test_circles_are_caught(changed, expected):
    base = {"anyup_fast/encoders/base.py": "", "anyup_fast/checkpoints.py": "", "kernels/tiles.py": ""}
    assert circles({**GOOD, **base}) == []
    faults = circles({**GOOD, **base, **changed})
    assert len(faults) == 1 and all(path in faults[0] for path in expected), faults


def test_heavy_import_reached_through_others_is_caught():
    chain = {
        **GOOD,
        "anyup_fast/__init__.py": GOOD["anyup_fast/__init__.py"] + "from .api import load_image",
        "anyup_fast/api.py": "from .encoders import base",
        "anyup_fast/encoders/__init__.py": "from . import hf",
    }
    faults = import_faults(chain)
    assert len(faults) == 1 and "anyup_fast/encoders/hf.py:3: transformers" in faults[0], faults


def test_kernels_package_holds_a_docstring_only():
    body = ast.parse((ROOT / "kernels" / "__init__.py").read_text(encoding="utf-8")).body
    assert len(body) == 1 and isinstance(body[0], ast.Expr) and isinstance(body[0].value.value, str)


def test_nobody_else_imports_the_folder_kernels_by_its_bare_name():
    sources = {name: text for name, text in python_sources("tests", "benchmarks", "hubconf.py", "setup.py").items()}
    assert "tests/test_house.py" in sources
    bare = [
        f"{path}:{line}"
        for path, source in sources.items()
        for name, line, _, _ in imports_of(path, source)
        if name.split(".")[0] == "kernels"
    ]
    assert bare == []
    # Other packages ask whether there is one of that name, and would take a folder of the tests for it.
    found = [place for place in (Path(folder, "kernels").resolve() for folder in sys.path) if place.is_dir()]
    assert [place for place in found if place.is_relative_to(ROOT / "tests")] == []


@pytest.mark.parametrize("name", ["anyup_fast/kernels", "conftest.py", "tests/__init__.py", "tests/*/__init__.py"])
def test_what_would_hide_the_installed_kernels_is_absent(name):
    assert list(ROOT.glob(name)) == []


NAMED_FILE = re.compile(r"`((?:[\w.]+/)*[\w.*]+\.py)`")


def missing_files(text, files):
    """Files that a page names in backticks and that are not in `files`, as they are named or below anyup_fast/.

    One that is named without its folder may lie anywhere.
    """

    def there(name):
        places = ("", "anyup_fast/") if "/" in name else ("*/",)
        return any(fnmatch.filter(files, place + name) for place in places)

    return [name for name in NAMED_FILE.findall(text) if not there(name)]


def test_files_that_the_design_names_exist():
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    files = [name.as_posix() for name in project_files()]
    assert len(NAMED_FILE.findall(page)) > 80
    assert missing_files(page, files) == []


def test_the_drawing_of_the_trip_names_what_the_design_names():
    spec = importlib.util.spec_from_file_location("trip", ROOT / "docs" / "trip.py")
    trip = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(trip)
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    files = [file for *_, file in trip.BOXES.values()] + [trip.CHOICE]
    assert [file for file in files if not (ROOT / file).is_file()] == []
    steps = page[page.index("## The trip of a tensor") : page.index("## The house")]
    assert [file for file in files if f"`{file.removeprefix('anyup_fast/')}`" not in steps] == []
    assert all((ROOT / folder).is_dir() for folder, _ in trip.ROOMS)
    assert {name for pair in trip.ARROWS for name in pair[:2]} == set(trip.BOXES)


@pytest.mark.parametrize("text", ["`ops/library.py`", "see `anyup_fast/upsampler.py` there", "`kernels/old_*.py`"])
def test_a_file_that_is_not_there_is_caught(text):
    assert len(missing_files(text, ["anyup_fast/ops/attention.py", "kernels/attention.py"])) == 1


def test_public_names_have_docstrings():
    assert undocumented(python_sources("anyup_fast", "kernels")) == []


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("def f():\n    return 1\n", ["f"]),
        ("class A:\n    def go(self):\n        return 1\n", ["A", "A.go"]),
        ("class A:\n    'What.'\n    def forward(self, x):\n        return x\n", []),
        (
            "class A(Base):\n    'What.'\n    def run(self):\n        pass\n    def go(self):\n        1\n",
            ["A.go"],
        ),
        ("def _f():\n    return 1\n\ndef g():\n    'What.'\n", []),
    ],
)
def test_missing_docstrings_are_caught(source, names):
    base = "class Base:\n    'What.'\n    def run(self):\n        'How.'\n"
    faults = undocumented({"a.py": source, "base.py": base})
    assert [fault.split(": ")[1].split()[0] for fault in faults] == names


def test_tree_holds_no_merge_markers_nor_paths_of_a_machine():
    faults, read = [], 0
    for name in project_files():
        content = (ROOT / name).read_bytes()
        if b"\0" not in content:
            faults += text_faults(name.as_posix(), content.decode("utf-8", errors="replace"))
            read += 1
    assert read > 10
    assert faults == []


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("x\n" + "<" * 7 + " ours\n" + ">" * 7 + " theirs\n", 2),
        ('open("' + "/home" + '/alice/a.png")', 1),
        ("see `" + "/work" + "/main`, or " + "/tmp" + "/a", 2),
        ("https://example.org" + "/home" + "/page and ~" + "/work" + "/x and a" + "/root" + "/b", 0),
        ("< 7 and " + "=" * 7 + " underlined", 0),
    ],
)
def test_text_faults_are_caught(text, count):
    assert len(text_faults("a.md", text)) == count


def test_no_tracked_file_is_large():
    sizes = {name.as_posix(): (ROOT / name).stat().st_size for name in project_files()}
    assert sizes["setup.py"] > 0
    assert {name: size for name, size in sizes.items() if size > MAX_TRACKED_BYTES} == {}
