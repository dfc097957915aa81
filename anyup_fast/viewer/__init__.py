"""One page of HTML in which features are looked at: hovered over, clicked on, labelled, exported."""

# The page's scripts in the order in which they run, one line each.
SCRIPTS = [
    "base.js",
    "data.js",
    "png.js",
    "safetensors.js",
    "colours.js",
    "volume.js",
    "pictures.js",
    "webgl.js",
    "similarity.js",
    "labels.js",
    "layers.js",
    "stage.js",
    "pointer.js",
    "exports.js",
    "panel.js",
    "legend.js",
    "keys.js",
    "page.js",
    "actions.js",
    "start.js",
]
