"""Linear heads from clicks, scribbles, masks and prompts; features at full resolution are never held."""

import logging
import operator
import os
from itertools import zip_longest

import numpy as np
import torch
import torch.nn.functional as F

from .heads import Head, checked_classes
from .masks import IGNORED, check_proportions, check_values, checked_mask, drawn_points
from .padded import Padded
from .prepared import Prepared

KINDS = ("prototype", "linear")
NEVER = -1e4  # bias of a class that no picture shows; float16 holds it

logger = logging.getLogger("anyup_fast")


def fit_head(
    inputs,
    targets,
    kind="prototype",
    *,
    classes=None,
    encoder=None,
    ignore=IGNORED,
    samples=256,
    seed=0,
    C=1.0,
    weights="embedded",
):
    """A linear head from pixels whose class is known, of one picture or of several.

    The features of these pixels are computed on their own (`Prepared.at`), a picture at a time, so that neither
    features at full resolution are held nor more than one picture where `inputs` and `targets` are generators.

    Args:
        inputs: what `prepare` gives for one picture, or a pair (image, features) for it; or several of them, a list or
            any other iterable.
        targets: for each of them, in the same order, what is known. Either points, (N, 3) whole numbers or a list of
            (row, column, class), pixels of the output. Or a mask of whole numbers (H, W) or the path of one (PNG, also
            with a palette), the class of each pixel; scribbles are masks that are `ignore` almost everywhere. A mask of
            another size than the output is laid over it where its proportions are the same.
        kind: "prototype", the mean of the class's features of unit length, brought to unit length, so that a pixel gets
            the class with the greatest cosine; "linear", multinomial logistic regression (scikit-learn).
        classes: a name for each class, in the order of their numbers; None leaves them without. With names there are as
            many classes; else one more than the greatest number.
        encoder: the name of the encoder of the features (or the encoder), which is kept with the head.
        ignore: what pixels of a mask are that count for nothing; None means that all count.
        samples: pixels that are drawn for each class of each mask at most; all points count.
        seed: of the draw.
        C: of "linear": the inverse of the strength of its penalty, for features of variance 1.
        weights: of AnyUp, for pairs; see `prepare`.

    Returns:
        anyup_fast.heads.Head, which `Prepared.head` and `anyup_fast.batch.run` take, and whose `save` makes the file
        that `--head` names: weight (K, C) and bias (K,), None for prototypes. A class that no picture shows keeps its
        place in the order, with a weight of zero and a bias by which it is never the answer; a warning names it.

    Raises:
        ValueError: inputs, points, masks or names that do not fit, fewer than two classes.
        RuntimeError: "linear" without scikit-learn.
    """
    fit = Fit(kind, classes, encoder, ignore, samples, seed, C)
    single = isinstance(inputs, Prepared) or _is_pair(inputs)
    pairs = [(inputs, targets)] if single else _zipped(inputs, targets)
    for number, (one, target) in enumerate(pairs):
        try:
            fit.add(_prepared(one, weights), target)
        except ValueError as error:
            if single:
                raise
            raise ValueError(f"number {number} of the inputs: {error}") from error
    return fit.head()


def prompt_head(encoder, prompts, *, classes=None, templates=("{}",), device=None):
    """A linear head from texts: each answer is the cosine between a feature and a prompt.

    Args:
        encoder: the name of a model that was trained with texts, such as "text:siglip2_base", or one that was loaded
            with `load_encoder(name, project=True)`. The features have to be its own.
        prompts: a text, or several, a class each.
        classes: a name for each; None means the prompts.
        templates: see `anyup_fast.encoders.text.TextEncoder.similarity`.
        device: where an encoder that is named computes.

    Returns:
        anyup_fast.heads.Head, of the kind "text".

    Raises:
        TypeError, ValueError, RuntimeError: prompts that are none; an encoder without a tower for texts, or without a
            tokenizer.
    """
    from .encoders import load_encoder
    from .encoders.text import TextEncoder

    if isinstance(encoder, str):
        encoder = load_encoder(encoder, device=device, project=True)
    if not isinstance(encoder, TextEncoder):
        name = getattr(encoder, "name", type(encoder).__name__)
        raise ValueError(
            f"encoder: {name} gives no features in the space of texts; load a CLIP or SigLIP model with "
            "load_encoder('text:NAME')"
        )
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    weight = encoder.similarity(prompts, templates).cpu()
    return Head(weight, None, prompts if classes is None else classes, encoder.name, "text")


class Fit:
    """What is gathered of pictures one by one for a head; arguments as of `fit_head`."""

    def __init__(self, kind="prototype", classes=None, encoder=None, ignore=IGNORED, samples=256, seed=0, C=1.0):
        if kind not in KINDS:
            raise ValueError(f"kind: need {' or '.join(map(repr, KINDS))}, got {kind!r}")
        if isinstance(samples, bool) or not hasattr(samples, "__index__") or samples < 1:
            raise ValueError(f"samples: need a positive number of pixels, got {samples!r}")
        if not isinstance(C, (int, float)) or not C > 0:
            raise ValueError(f"C: need a positive number, got {C!r}")
        if kind == "linear":
            _regression()  # before any work
        classes = None if classes is None else checked_classes(tuple(classes), len(tuple(classes)))
        self.kind, self.classes, self.ignore, self.samples, self.C = kind, classes, ignore, operator.index(samples), C
        self.encoder = encoder if isinstance(encoder, (str, type(None))) else encoder.name
        self._rng = np.random.default_rng(seed)
        self._features, self._labels = [], []  # of prototypes sums and their classes

    def add(self, prepared, target):
        """Take what is known of one picture.

        Args:
            prepared: `Prepared` of one picture. target: its points or mask, as of `fit_head`.

        Raises:
            ValueError: what does not fit.
        """
        batch = len(prepared.maps)
        if batch != 1:
            raise ValueError(f"inputs: prepare one picture at a time, got a batch of {batch}")
        places, labels, align = self._points(target, prepared.output_size)
        if not len(labels):
            return
        found = prepared.at(places, align=align)
        if not found.is_floating_point():
            raise ValueError("inputs: this prepared image answers with labels; give the one without a head")
        features = found[0].float().cpu()
        if self._features and self._features[0].shape[1] != features.shape[1]:
            raise ValueError(f"inputs: {features.shape[1]} channels, the ones before have {self._features[0].shape[1]}")
        if self.kind == "prototype":
            unit = F.normalize(features.double(), dim=1)
            shown, labels = np.unique(labels, return_inverse=True)
            features = unit.new_zeros(len(shown), unit.shape[1]).index_add_(0, torch.from_numpy(labels), unit)
            labels = shown
        self._features.append(features)
        self._labels.append(labels)

    def head(self, count=1):
        """The `Head` of all that was taken, with `count` classes at least."""
        labels = np.concatenate(self._labels) if self._labels else np.empty(0, np.int64)
        shown = np.unique(labels)
        if len(shown) < 2:
            told = f"only class {shown[0]}" if len(shown) else "no class"
            raise ValueError(
                f"targets: need points or pixels of two classes at least, there is {told}"
                + ("" if self.ignore is None else f"; {self.ignore} counts for nothing, ignore=... names another value")
            )
        features = torch.cat(self._features)
        if self.kind == "prototype":
            sums = features.new_zeros(len(shown), features.shape[1])
            sums.index_add_(0, torch.from_numpy(np.searchsorted(shown, labels)), features)
            weight, bias = F.normalize(sums, dim=1), None
        else:
            weight, bias = _logistic(features.numpy(), labels, self.C)
        count = max(count, int(shown[-1]) + 1) if self.classes is None else len(self.classes)
        if len(shown) < count:
            missing = sorted(set(range(count)) - set(shown.tolist()))
            named = ", ".join(str(n) if self.classes is None else f"{n} ({self.classes[n]})" for n in missing[:20])
            more = f" and {len(missing) - 20} more" if len(missing) > 20 else ""
            logger.warning("fit_head: nothing shows the classes %s%s; they will never be the answer", named, more)
            place = torch.from_numpy(shown)
            biases = weight.new_full((count,), NEVER)
            biases[place] = weight.new_zeros(len(shown)) if bias is None else bias
            weight, bias = weight.new_zeros(count, weight.shape[1]).index_copy_(0, place, weight), biases
        bias = None if bias is None else bias.float()
        return Head(weight.float(), bias, self.classes, self.encoder, self.kind)

    def _points(self, target, size):
        """Places (N, 2), their classes (N,), and how `Prepared.at` is to read them."""
        if _is_points(target, size):
            points = _checked_points(target)
            labels = points[:, 2]
            if len(labels):
                check_values(labels[None], None if self.classes is None else len(self.classes), ignore=None)
            return points[:, :2], labels, "pixel"
        mask = checked_mask(target)
        check_values(mask, None if self.classes is None else len(self.classes), self.ignore)
        check_proportions(mask, size)
        return *drawn_points(mask, self.samples, self._rng, self.ignore), "normalized"


def _is_pair(one):
    return isinstance(one, tuple) and len(one) == 2 and isinstance(one[1], torch.Tensor)


def _prepared(one, weights):
    if isinstance(one, Prepared):
        return one
    if isinstance(one, (tuple, list)) and len(one) == 2:
        from .api import prepare

        image, features = one
        if isinstance(image, (torch.Tensor, Padded)) or hasattr(image, "shape"):
            return prepare(image, features, weights)
    raise ValueError(f"inputs: need what prepare gives, or a pair (image, features), got {type(one).__name__}")


def _zipped(inputs, targets):
    for name, several in (("inputs", inputs), ("targets", targets)):
        if isinstance(several, (str, os.PathLike)) or not hasattr(several, "__iter__"):
            raise ValueError(f"{name}: need one picture's, or a list of several, got {type(several).__name__}")
    nothing = object()
    for number, pair in enumerate(zip_longest(inputs, targets, fillvalue=nothing)):
        if pair[0] is nothing or pair[1] is nothing:
            more, fewer = ("inputs", "targets") if pair[1] is nothing else ("targets", "inputs")
            raise ValueError(
                f"targets: need one for each of the inputs; there are more {more} than the {number} {fewer}"
            )
        yield pair


def _is_points(target, size):
    """Whether a target is points: a list of triples, or an array of three columns that is no mask of that size."""
    if isinstance(target, (str, os.PathLike)):
        return False
    shape = np.shape(target) if not isinstance(target, torch.Tensor) else tuple(target.shape)
    return shape == (0,) or len(shape) == 2 and shape[1] == 3 and shape != tuple(size)


def _checked_points(target):
    points = target.cpu().numpy() if isinstance(target, torch.Tensor) else np.asarray(target)
    if not points.size:
        return np.empty((0, 3), np.int64)
    if points.dtype.kind not in "iu":
        raise ValueError(f"targets: points are whole numbers (row, column, class), got {points.dtype}")
    return points.astype(np.int64)


def _regression():
    try:
        from sklearn.linear_model import LogisticRegression
    except ModuleNotFoundError as error:
        raise RuntimeError(
            "fit_head: kind='linear' needs scikit-learn: pip install 'anyup-fast[fit]'; kind='prototype' needs nothing"
        ) from error
    return LogisticRegression


def _logistic(features, labels, C):
    """Weight (K, C) and bias (K,) of multinomial logistic regression, float64, for the K labels in ascending order."""
    mean, spread = features.mean(0, dtype=np.float64), features.std(0, dtype=np.float64)
    spread = np.where(spread > 0, spread, 1)
    fitted = _regression()(C=C, max_iter=1000).fit((features - mean) / spread, labels)
    weight, bias = torch.from_numpy(fitted.coef_), torch.from_numpy(fitted.intercept_)
    if len(weight) == 1:  # of two classes one is told; each gets half of the difference
        weight, bias = torch.cat((-weight, weight)) / 2, torch.cat((-bias, bias)) / 2
    weight = weight / torch.from_numpy(spread)
    return weight, bias - weight @ torch.from_numpy(mean)
