"""A film of the pictures that a run has made."""

from .archive import open_archive
from .sources import find_sources
from .video import frame_rate, write_film


def make_film(input, output, path, rate=None):
    """Make a film of the PCA pictures of a run, in the order of its input; frames that failed are left out.

    Args:
        input, output: of the run. path: .mp4, .mkv or .mov file.
        rate: frames per second; None means those of the video, or 25.

    Returns:
        how many frames it has.

    Raises:
        ValueError: a run of another kind, pictures of different sizes, none at all, another suffix.
    """
    archive, sources = open_archive(output), find_sources(input, without=output)
    names = [source.name for source in sources if source.name in archive]
    for name in names:
        if archive.settings(name).kind != "pca":
            raise ValueError(f"output: a film is made of PCA pictures, {output} holds {archive.settings(name).kind}")
    if rate is None:
        rate = frame_rate(sources[0].path) if sources[0].frame is not None else 25
    return write_film((archive[name].full().permute(1, 2, 0).numpy() for name in names), path, rate)
