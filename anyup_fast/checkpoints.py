"""Finding, fetching and checking checkpoints: a name, a path or a URL becomes a strict state dict."""

import hashlib
import http.client
import inspect
import json
import logging
import os
import pickle
import secrets
import shutil
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import unquote, urlsplit

import torch

from .files import alone, expanded, written_aside

logger = logging.getLogger("anyup_fast")

PUBLISHED = {
    "anyup_multi_backbone": "https://github.com/wimmerth/anyup/releases/download/checkpoint_v2/anyup_multi_backbone.pth",
    "anyup_paper": "https://github.com/wimmerth/anyup/releases/download/checkpoint/anyup_paper.pth",
}
EMBEDDED = Path(__file__).parent / "weights" / "embedded.safetensors"


def cache_folder():
    """Folder of downloaded checkpoints: `checkpoints` below torch.hub's directory (TORCH_HOME moves it)."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def load_checkpoint(weights, architecture=None):
    """Load a checkpoint of AnyUp.

    Args:
        weights: "embedded" (ships with the package), "anyup_multi_backbone" or "anyup_paper" (published by the
            authors under CC-BY-4.0, downloaded once to `cache_folder()`), or a path or http(s)/file URL of a
            .safetensors file or of a pickled state dict. Pickles are loaded with `weights_only=True`: code in them
            is refused, not run.
        architecture: class (or function) that makes the module of the checkpoint's config, to whose names and shapes
            the state dict is held strictly; None leaves that to the caller.

    Returns:
        (state_dict, config): float tensors by name, and keyword arguments for `AnyUp`. A safetensors file may carry
        the arguments as JSON under "config" in its metadata; without that they are the defaults.

    Raises:
        ValueError: unknown name, names or shapes that are not AnyUp's, non-finite values, code in a pickle.
        FileNotFoundError: no such file.
        RuntimeError: the download failed, or the file is damaged.
        OSError: the file cannot be read.
    """
    path = locate_checkpoint(weights)
    state_dict, config = _read(path)
    if architecture is not None:
        _check_names(state_dict, config, path, architecture)
    _check_values(state_dict, path)
    return state_dict, config


def pretrained(architecture, weights, device=None, window_rule=None):
    """A module with the weights of a checkpoint, in eval mode: `AnyUp.from_pretrained`, which see.

    It has the checkpoint's dtype, and can be trained, whatever defaults or modes of PyTorch are set around the call.
    """
    state_dict, config = load_checkpoint(weights, architecture)
    if window_rule is not None:
        config = {**config, "window_rule": window_rule, "use_natten": False}
    with torch.inference_mode(False), torch.device("cpu"):
        module = architecture(**config).to(next(iter(state_dict.values())).dtype)
        module.load_state_dict(state_dict)
        return module.to("cpu" if device is None else device).eval()


def locate_checkpoint(weights):
    """Path of the file behind `weights` (see `load_checkpoint`), downloading it if it is remote and not there yet.

    A published checkpoint keeps its name in `cache_folder()`; that of another URL begins with a digest of the URL.
    """
    if not isinstance(weights, (str, os.PathLike)):
        raise ValueError(f"weights: need a name, a path or a URL, got {type(weights).__name__}")
    name = os.fspath(weights)
    if name == "embedded":
        if not EMBEDDED.is_file():
            raise FileNotFoundError(f"weights: 'embedded' is missing, there is no {EMBEDDED}; reinstall anyup-fast")
        return EMBEDDED
    if name in PUBLISHED or "://" in name:
        return _downloaded(name)
    path = expanded(name)
    if path.is_file():
        return path
    known = ", ".join(repr(known) for known in ("embedded", *PUBLISHED))
    if path.suffix or os.sep in name:
        raise FileNotFoundError(f"weights: there is no file {name!r}; check the path, or use {known} or a URL")
    raise ValueError(f"weights: no checkpoint is called {name!r}; use {known}, a path or a URL")


def published_path(name):
    """Where the download of a published checkpoint lies, or would lie."""
    return cache_folder() / PUBLISHED[name].rsplit("/", 1)[-1]


def _downloaded(name):
    if name in PUBLISHED:
        url, target = PUBLISHED[name], published_path(name)
    else:
        url, parts = name, urlsplit(name)
        file = unquote(parts.path).rsplit("/", 1)[-1]
        if parts.scheme == "file" and parts.netloc in ("", "localhost"):
            return locate_checkpoint(urllib.request.url2pathname(parts.path))
        if parts.scheme not in ("http", "https") or not parts.netloc or not file:
            raise ValueError(f"weights: need http(s)://HOST/.../FILE or file:///PATH, got the URL {url!r}")
        target = cache_folder() / f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{file}"
    if not target.is_file():
        download(url, target)
    return target


def download(url, target, *, timeout=30.0):
    """Fetch `url` to the path `target`, unless it is there by now.

    Of several processes one fetches at a time, and the others find its file; what an attempt left, `<name>.part`, is
    gone on with. On a file system without locks each fetches a file of its own.

    Raises:
        RuntimeError: no network, an error of the server, or fewer bytes than announced; the message tells how to
            put the file in place by hand. What has arrived is kept for the next attempt.
    """
    target = expanded(target)
    lock = target.with_name(target.name + ".lock")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with alone(lock, f"downloading {target.name}") as locked:
            if not target.is_file():
                _fetch(url, target, locked, timeout)
    except (OSError, http.client.HTTPException) as error:
        raise RuntimeError(_by_hand(url, target, getattr(error, "reason", error))) from error
    return target


def _fetch(url, target, locked, timeout):
    """Fetch `url` to `target`, alone in going on with the part of an earlier attempt where `locked`."""
    part = target.with_name(target.name + ".part")
    shared = locked and (not part.exists() or os.access(part, os.W_OK))  # else another user began it
    if not shared:
        part = target.with_name(f"{target.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    logger.info("downloading %s to %s", url, target)
    try:
        have = part.stat().st_size if part.exists() else 0
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        with urllib.request.urlopen(request, timeout=timeout) as reply:
            span = reply.headers.get("Content-Range", f"bytes {have}-")
            resumed = reply.status == 206 and span.startswith(f"bytes {have}-")
            if reply.status == 206 and not resumed:
                raise OSError(f"the server sent {span!r}, asked from byte {have}")
            announced = reply.headers.get("Content-Length")
            with open(part, "ab" if resumed else "wb") as file:
                shutil.copyfileobj(reply, file)
            total = int(announced) + (have if resumed else 0) if announced else None
        if total is not None and part.stat().st_size != total:
            raise OSError(f"{part.stat().st_size} of {total} bytes arrived")
        os.replace(part, target)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not part.exists():
            raise OSError(f"the server answered {error.code} {error.reason}") from error
        part.unlink()  # longer than the file, or of another one
        _fetch(url, target, locked, timeout)
    finally:
        if not shared:
            part.unlink(missing_ok=True)


def save_checkpoint(path, state_dict, config=None, **metadata):
    """Write a state dict as safetensors, with the arguments of `AnyUp` and further strings as metadata."""
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
    metadata = {name: str(value) for name, value in metadata.items()} | {"config": json.dumps(config or {})}
    with written_aside(path) as aside:
        save_file(tensors, aside, metadata)


def _by_hand(url, target, why):
    return (
        f"could not download {url}: {why}. With a network, try again (the download resumes); without one, fetch the "
        f"file elsewhere and put it at {target} (TORCH_HOME names another folder), or pass weights=<path of the file>"
    )


def _read(path):
    """(state_dict, config) as they lie in the file, unchecked."""
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                config = json.loads((file.metadata() or {}).get("config", "{}"))
                return {name: file.get_tensor(name) for name in file.keys()}, config
        except (SafetensorError, json.JSONDecodeError) as error:
            raise RuntimeError(_damaged(path, error)) from error
    try:
        state_dict = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        with open(path, "rb") as file:
            first = file.read(1)
        if first not in (b"P", b"\x80"):  # what zip files and pickles begin with
            raise RuntimeError(_damaged(path, "no pickle of tensors")) from error
        raise ValueError(
            f"weights: {path} is no plain state dict: its pickle holds other objects or code, which is not run; save "
            "the model's state_dict() instead"
        ) from error
    except OSError:
        raise
    except Exception as error:  # what the unpickler meets in a file of another kind raises anything
        raise RuntimeError(_damaged(path, error)) from error
    if not isinstance(state_dict, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in state_dict.items()
    ):
        raise ValueError(f"weights: {path} holds no state dict (a dict of tensors); save the model's state_dict()")
    return dict(state_dict), {}


def _damaged(path, error):
    reason = next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
    return f"weights: {path} is damaged or no checkpoint ({reason}); remove it and fetch it again"


def _check_names(state_dict, config, path, architecture):
    known = inspect.signature(architecture).parameters.keys()
    unknown = set(config) - known if isinstance(config, dict) else {repr(config)}
    if unknown:
        raise ValueError(f"weights: the config in {path} has arguments that AnyUp does not know: {sorted(unknown)}")
    try:
        with torch.device("meta"):
            expected = {name: tensor.shape for name, tensor in architecture(**config).state_dict().items()}
    except (TypeError, ValueError, RuntimeError, ArithmeticError, AssertionError) as error:
        raise ValueError(f"weights: no AnyUp can be made from the config {config} in {path}: {error}") from error
    missing, extra = sorted(expected.keys() - state_dict.keys()), sorted(state_dict.keys() - expected.keys())
    if missing or extra:
        raise ValueError(
            f"weights: {path} is no AnyUp checkpoint: {len(missing)} names missing {missing[:3]}, "
            f"{len(extra)} unknown {extra[:3]}; a state dict needs AnyUp's names, no more and no less"
        )
    for name, tensor in state_dict.items():
        if tensor.shape != expected[name]:
            raise ValueError(
                f"weights: {name} in {path} has shape {tuple(tensor.shape)}, AnyUp needs {tuple(expected[name])}; "
                "other widths need their config beside them (see save_checkpoint)"
            )


def _check_values(state_dict, path):
    for name, tensor in state_dict.items():
        if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            raise ValueError(
                f"weights: {name} in {path} is not a finite floating-point tensor; fetch or train it again"
            )
