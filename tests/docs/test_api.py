"""The API pages: every public name has its place, and links between them lead somewhere."""

from importlib.util import module_from_spec, spec_from_file_location

import pytest
from tree import ROOT

import anyup_fast

spec = spec_from_file_location("api_pages", ROOT / "docs" / "api.py")
api = module_from_spec(spec)
spec.loader.exec_module(api)


def test_links_that_lead_nowhere_are_told(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.html").write_text(
        '<a href="sub/b.html#there">x</a> <a href="https://example.org">x</a> <a class="y" href="#own">x</a>'
        '<p id="own"></p><script>s = `<a href="${url}">`</script>'
    )
    (tmp_path / "sub" / "b.html").write_text('<p id="there"></p><a href="../a.html">x</a>')
    assert api.broken_links(tmp_path) == []
    (tmp_path / "sub" / "b.html").write_text('<a href="../c.html">x</a><a href="../a.html#no">x</a><a href="#no">x</a>')
    assert api.broken_links(tmp_path) == [
        "a.html: sub/b.html#there leads to no place of sub/b.html",
        "sub/b.html: #no leads to no place of sub/b.html",
        "sub/b.html: ../a.html#no leads to no place of a.html",
        "sub/b.html: ../c.html leads to no page",
    ]


@pytest.mark.slow("`make docs` does the same, in the public CI as well")
def test_the_pages_are_made(tmp_path, capsys):
    pytest.importorskip("pdoc")
    assert api.main(["--out", str(tmp_path)]) == 0, capsys.readouterr().out
    text = (tmp_path / "anyup_fast.html").read_text(encoding="utf-8")
    assert [name for name in anyup_fast.__all__ if f'id="{name}"' not in text] == []
    for module in api.MODULES:
        assert (tmp_path / f"{module.replace('.', '/')}.html").is_file()
    assert not (tmp_path / "anyup_fast" / "cli.html").exists()
