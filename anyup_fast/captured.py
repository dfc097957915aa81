"""Forwards of one shape captured in a CUDA graph: one launch in place of some forty, for streams of equal pictures."""

import threading
from collections import OrderedDict
from weakref import WeakKeyDictionary, ref

import torch

from .checks import check_shapes, checked_output_size
from .kept import Kept, captured_here, state_of
from .layers import computed_dtype
from .ops.attention import why_not
from .ops.choice import asked

MOST = 8  # captured forwards that a model keeps for its next calls
KINDS = ("cuda",)  # of devices whose work can be captured

_captured = WeakKeyDictionary()  # model -> OrderedDict of its captured forwards, the one used last at the end
_lock = threading.Lock()


class Captured:
    """`AnyUp.forward` for images and features of one shape, replayed from a CUDA graph; see `AnyUp.captured`.

    A call copies its arguments into `image` and `features` and replays the graph on the current stream. Whoever fills
    these two in place calls it without arguments. It is captured with the first call, and anew when a parameter, the
    window, or the back end that is asked for is another one than then.

    Attributes:
        image, features, values: what the graph reads; values is None where the features are mixed.
        captures: how often it was captured.
    """

    def __init__(self, model, image_shape, features_shape, output_size, dtypes, values_shape=None):
        device = next(model.parameters()).device
        self._model, self._thread = ref(model), threading.get_ident()
        self.output_size = output_size
        self.image = torch.zeros(image_shape, dtype=dtypes[0], device=device)
        self.features = torch.zeros(features_shape, dtype=dtypes[1], device=device)
        self.values = None if values_shape is None else torch.zeros(values_shape, dtype=dtypes[1], device=device)
        self.captures = 0
        self._state = self._graph = self._out = self._kept = self._stream = None

    def __call__(self, image=None, features=None, values=None):
        """What `forward` returns for them: the same tensor every time, which the next call writes over.

        Args:
            image, features, values: of the shapes that it was made for, of any float dtype; None leaves what is there.

        Raises:
            ValueError: another shape. RuntimeError: it was made by another thread, or the model is gone.
        """
        model = self._model()
        if model is None:
            raise RuntimeError("the model of this captured forward is gone: keep it, or capture another")
        if threading.get_ident() != self._thread:
            raise RuntimeError("a captured forward serves the thread that made it: call AnyUp.captured in this one")
        if values is not None and self.values is None:
            raise ValueError("values: this one was captured without; AnyUp.captured(..., values_shape=...) takes some")
        inputs = (image, self.image), (features, self.features), (values, self.values)
        for name, (given, own) in zip(("image", "features", "values"), inputs, strict=True):
            if given is not None and given.shape != own.shape:
                raise ValueError(f"{name}: captured for shape {tuple(own.shape)}, got {tuple(given.shape)}")
        with torch.no_grad(), torch.cuda.device(self.image.device):
            stream = torch.cuda.current_stream(self.image.device)
            if self._stream is not None and self._stream != stream:
                stream.wait_stream(self._stream)  # which may still read the output, or copy into the inputs
            self._stream = stream
            state = _state(model)
            if self._state != state:
                self._capture(model, state)
            for given, own in inputs:
                if given is not None and given is not own:
                    own.copy_(given, non_blocking=True)
            self._graph.replay()
        return self._out

    def wait(self):
        """Wait for what was replayed: afterwards its memory may go."""
        if self._stream is not None:
            self._stream.synchronize()

    def _capture(self, model, state):
        self.wait()
        self._state = self._graph = self._out = None  # their memory first
        self._kept = Kept()

        def run():
            with captured_here(self._kept):
                return model.forward(self.image, self.features, output_size=self.output_size, values=self.values)

        self._graph, self._out = captured_graph(run, self.image.device)
        self._state = state
        self.captures += 1


def captured_graph(run, device):
    """(graph, what `run()` returned while it was captured), after two calls that compile and make what is kept."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        out = run()
    return graph, out


def _state(model):
    """All that a captured forward depends on besides its inputs; equal as long as it is right."""
    decode = model.cross_decode
    weight = model.image_encoder[0].weight
    windows = model.window_ratio, decode.window_rule, decode.head_mode
    return state_of(model), asked(), windows, computed_dtype(weight, weight.device)


def captured(
    model, image_shape, features_shape, output_size=None, dtype=None, features_dtype=None, values_shape=None
):  # fmt: skip
    """`AnyUp.captured`."""
    check_shapes(image_shape, features_shape, values_shape)
    output_size = checked_output_size(output_size, image_shape[2:])
    weight = model.image_encoder[0].weight
    dtype = weight.dtype if dtype is None else dtype
    dtypes = dtype, dtype if features_dtype is None else features_dtype
    if image_shape[1] != model.input_dim:
        raise ValueError(f"image_shape: need {model.input_dim} channels, got {tuple(image_shape)}")
    if not all(isinstance(one, torch.dtype) and one.is_floating_point for one in dtypes):
        raise ValueError(f"dtype, features_dtype: need floating dtypes or None, got {dtype} and {features_dtype}")
    if reason := _why_not_captured(model, weight, dtypes[1]):
        raise RuntimeError(f"this model's forward can't be captured: {reason}")
    values_shape = None if values_shape is None else tuple(values_shape)
    shapes = tuple(image_shape), tuple(features_shape), values_shape
    key = threading.get_ident(), weight.device, *shapes, output_size, dtypes
    with _lock:
        known = _captured.setdefault(model, OrderedDict())
        found = known.pop(key, None) or Captured(model, *shapes[:2], output_size, dtypes, values_shape)
        known[key] = found
        while len(known) > MOST:
            known.popitem(last=False)[1].wait()
    return found


def _why_not_captured(model, weight, dtype):
    """Why a model's forward can't be captured: one sentence, or None."""
    if weight.device.type not in KINDS:
        return f"needs a CUDA device, the model is on {weight.device}; call the model itself"
    if reason := model.why_not_fused():
        return reason
    if state_of(model) is None:
        return "changes of its parameters can't be seen (inference tensors, parametrizations or a replica)"
    reason = why_not("triton", weight.device, computed_dtype(weight, weight.device), dtype)
    return f"its kernels can't run: {reason}" if reason else None
