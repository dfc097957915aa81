"""The prototypes that a page starts with."""

import logging
import os

import torch
import torch.nn.functional as F

from ..heads import Head, linear_head, read_head

MOST = 9  # a digit of the keyboard for each
_log = logging.getLogger("anyup_fast")
_ALIKE = 1e-3  # by which lengths of rows may differ


class Classes:
    """Names and prototypes of a head, none of `head` None.

    Attributes:
        names: of the classes.

    Raises:
        ValueError: a bias, rows of different or no length, more than nine of them: what labels by cosine can't show.
    """

    def __init__(self, head):
        self.names, self._weight, self._head = [], None, None
        if head is None:
            return
        self._said = f"head: {os.fspath(head)}" if isinstance(head, (str, os.PathLike)) else "head: it"
        if isinstance(head, (str, os.PathLike)):
            head = read_head(head)
        self._head = head if isinstance(head, Head) else None
        weight, bias = linear_head(head)
        names = self._head and self._head.classes
        if bias is not None and bias.abs().max() > 0:
            raise ValueError(
                f"{self._said} has a bias; the page labels by the nearest prototype: give one without, of prototypes"
            )
        if len(weight) > MOST:
            raise ValueError(f"{self._said} has {len(weight)} classes; the page shows {MOST} at most")
        lengths = weight.detach().float().norm(dim=1)
        if not lengths.isfinite().all() or not 0 < lengths.max() <= (1 + _ALIKE) * lengths.min():
            raise ValueError(
                f"{self._said} has rows of {lengths.min():.3g} to {lengths.max():.3g} in length; the page compares by "
                "cosine, which labels as the head does only where all have one length (fit_head's prototypes have)"
            )
        self._weight = F.normalize(weight.detach().float().cpu(), dim=1)
        self.names = list(names or [f"class {i + 1}" for i in range(len(weight))])

    def directions(self, channels, encoder=None):
        """The prototypes (K, channels), of unit length; with a warning where they were made for another `encoder`.

        Raises:
            ValueError: the head has other channels.
        """
        if self._weight is None:
            return torch.empty(0, channels)
        if self._weight.shape[1] != channels:
            raise ValueError(
                f"{self._said} has {self._weight.shape[1]} channels, the features {channels}: it was made with another "
                "encoder"
            )
        why_not = None if encoder is None or self._head is None else self._head.why_not_on(encoder)
        if why_not:
            _log.warning("%s", why_not)
        return self._weight
