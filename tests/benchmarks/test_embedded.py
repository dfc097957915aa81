"""The table of the runs behind the embedded weights: its commands parse, its order holds, a small one is executed."""

import shlex
from importlib.util import module_from_spec, spec_from_file_location

import pytest
import tiny
import torch
from safetensors.torch import load_file
from tree import ROOT

from anyup_fast import cli
from anyup_fast.checkpoints import EMBEDDED

SCRIPT = ROOT / "benchmarks" / "embedded.py"
if not SCRIPT.is_file():
    pytest.skip("benchmarks/ is not beside the tests", allow_module_level=True)
spec = spec_from_file_location("embedded", SCRIPT)
embedded = module_from_spec(spec)
spec.loader.exec_module(embedded)

SMALL = """run,how,of,sources,pictures,size,steps,batch,guide-pixels,ema,mask-weight,encoders
a,train,,first,2,112,1,1,400,0.9,1,ENCODER
b_1,until,b 1,,,,,,,,,
b,train,a,all,1,112,2,1,400,0.9,,ENCODER
c,train,a,all,1,112,2,1,400,0.9,5,ENCODER
d,soften,b_1 0.8,,,,,,,,,
e,mean,b 0.25 d 0.75,,,,,,,,,
"""


def test_every_command_of_the_table_parses(capsys):
    assert embedded.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    trained, steps = {}, 0
    for line in lines:
        if line.startswith("#"):
            continue
        program, *words = shlex.split(line)
        arguments = cli._parser().parse_args(words)
        assert program == "anyup-fast" and arguments.run.__module__ == "anyup_fast.cli.train"
        name = arguments.out.removeprefix("RUNS/")
        steps += (arguments.until or arguments.steps) - trained.get(name, 0)
        trained[name] = arguments.until or arguments.steps
    assert len(trained) == 31 and steps == 34_750  # as the model card says
    assert [line for line in lines if line.endswith("# at: 0.5 ar + 0.5 as")] == lines[-1:]


def test_every_row_comes_after_what_it_is_made_from():
    rows = embedded.read()
    for index, (name, row) in enumerate(rows.items()):
        words = row["of"].split()
        assert row["how"] in ("train", "mean", "soften", "until"), name
        if row["how"] == "until":
            assert list(rows).index(words[0]) > index
            words = []
        named = [word for word in words if not word.replace(".", "").isdigit()]
        assert all(word in list(rows)[:index] for word in named), name
        if row["how"] == "mean":
            assert sum(float(word) for word in words[1::2]) == 1
        assert (row["how"] == "train") == bool(row["sources"]) == bool(row["steps"])
    assert "q" not in embedded.needed(rows, "at") and "q" in embedded.needed(rows, "q")


def test_a_table_is_executed_and_goes_on(tmp_path, capsys):
    pytest.importorskip("transformers")
    scenes, stamps = tiny.picture_folders(tmp_path)
    encoder = tiny.encoder_folder(tmp_path / "encoder")
    table = tmp_path / "table.csv"
    table.write_text(SMALL.replace("ENCODER", encoder))
    runs = tmp_path / "runs"
    words = [str(runs), "--table", str(table), "--first", str(scenes), str(stamps), "--all", str(scenes), str(stamps)]
    assert embedded.main([*words, "--target", "b_1"]) == 0
    assert sorted(path.name for path in runs.iterdir()) == ["a", "b", "b_1"]
    assert not (runs / "b" / embedded.WEIGHTS).exists()
    assert embedded.main(words) == 0
    assert "resuming at step 1 of 2" in capsys.readouterr().out
    assert not (runs / "c").exists(), "nothing needs it"
    early, whole, soft, made = (load_file(runs / name / embedded.WEIGHTS) for name in ("b_1", "b", "d", "e"))
    name = "cross_decode.cross_attn.attention.in_proj_weight"
    dim = len(early[name]) // 3
    assert torch.equal(soft[name][:dim], early[name][:dim] * 0.8) and torch.equal(soft[name][dim:], early[name][dim:])
    assert not torch.equal(early[name], whole[name])
    torch.testing.assert_close(made[name], 0.25 * whole[name] + 0.75 * soft[name])
    assert made.keys() == load_file(EMBEDDED).keys()
    before = (runs / "b" / embedded.WEIGHTS).stat().st_mtime_ns
    assert embedded.main(words) == 0
    assert (runs / "b" / embedded.WEIGHTS).stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["RUNS"], "name the pictures: --first SCENES STAMPS --all SCENES STAMPS"),
        (["--list", "--target", "zz"], "no row 'zz'; there are a, b, c"),
        (["--list", "--table", "nowhere.csv"], "nowhere.csv"),
    ],
)
def test_what_can_not_be_done_is_said(words, said, capsys):
    assert embedded.main(words) == 2
    assert said in capsys.readouterr().err
