"""Patch features in the space of texts, and texts as heads: models that were trained on pairs of both.

What the model does with its class token (CLIP, Radford et al., 2021) or with its pooled tokens (SigLIP, Zhai et al.,
2023) is done with every patch token, so that it can be compared with the embedding of a text:

* CLIP and its kind: the final norm of the vision tower, then the projection: `P norm(x)`.
* SigLIP and SigLIP 2: the final norm, then the pooling head with that one token in place of all of them. Its attention
  has one key then, whose weight is 1, so it gives `y = O (V norm(x) + v) + o`; and the head ends with `y +
  MLP(norm(y))`. This is the value path of MaskCLIP (Zhou et al., 2022) in the pooling head.
"""

import inspect

import torch
from torch.nn import functional as F

from ..files import expanded
from . import huggingface
from .base import Encoder, newer, optional_import, read_pretrained, tokens_to_grid


class TextEncoder(Encoder):
    """A model of transformers with a tower for images and one for texts; features in the space of the texts.

    Every feature has unit length. Any layer goes through the final norm and the projection; those before the last are
    not what they were trained on, and the last one's patches mix what the whole picture shows.
    """

    def __init__(self, name, model, place, **attributes):
        super().__init__(name, **attributes)
        self.model = model
        self._place, self._tokenizer = place, None

    @property
    def pooled(self):
        """Whether the vision tower ends with a pooling head (SigLIP), not with a class token (CLIP)."""
        return not hasattr(self.model, "visual_projection")

    def features_of_layers(self, image, layers):
        output = self.model.vision_model(pixel_values=image, output_hidden_states=True, interpolate_pos_encoding=True)
        return [self._projected(output.hidden_states[layer], image.shape[2:]) for layer in layers]

    def features(self, image, layer):
        return self.features_of_layers(image, (layer,))[0]

    def _projected(self, tokens, size):
        grid = [n // self.patch_size for n in size]
        tower, prefix = self.model.vision_model, 0 if self.pooled else 1
        if tokens.shape[1] != prefix + grid[0] * grid[1]:
            raise RuntimeError(
                f"{self.name} gave {tokens.shape[1]} tokens for H = {size[0]}, W = {size[1]}, not {prefix} and a grid "
                f"of {grid[0]}x{grid[1]} patches"
            )
        tokens = tower.post_layernorm(tokens[:, prefix:])
        if self.pooled:
            projected = tower.head(tokens.flatten(0, 1)[:, None]).unflatten(0, tokens.shape[:2])
        else:
            projected = self.model.visual_projection(tokens)
        return tokens_to_grid(F.normalize(projected, dim=-1), grid)

    @torch.no_grad()
    def similarity(self, prompts, templates=("{}",)):
        """Texts as a head: each answer is the cosine between a feature and a text.

        Features have unit length, and so have the rows of the head; through `prepare(image, features).head(...)` a
        pixel gets the mean of the cosines of the cells that it looks at.

        Args:
            prompts: a text, or several.
            templates: texts with a {} for the prompt, such as ("a photo of a {}.", "a drawing of a {}."); the
                embeddings of one prompt in all of them are averaged, and the mean is brought to unit length again.

        Returns:
            (K, C) on the encoder's device, a row of unit length for each prompt: what `Prepared.head` takes.

        Raises:
            TypeError: a prompt that is no string. ValueError: none, an empty one, or a template without {}.
            RuntimeError: the model's tokenizer can't be had.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        templates = [templates] if isinstance(templates, str) else list(templates)
        for text in (*prompts, *templates):
            if not isinstance(text, str):
                raise TypeError(f"prompts and templates must be strings, got {type(text).__name__}")
        if not prompts or not all(text.strip() for text in prompts):
            raise ValueError(f"prompts: need at least one text, and no empty one, got {prompts}")
        if not templates or not all("{}" in text for text in templates):
            raise ValueError(f"templates: need texts with {{}} for the prompt, got {templates}")
        texts = [template.replace("{}", prompt) for prompt in prompts for template in templates]
        embedded = F.normalize(self._embedded(texts), dim=-1).unflatten(0, (len(prompts), len(templates)))
        return F.normalize(embedded.mean(1), dim=-1)

    def _embedded(self, texts):
        if self._tokenizer is None:
            ways = "the model's tokenizer: network access or a filled local cache, or the files in the folder"
            loader = optional_import("transformers").AutoTokenizer
            tokenizer = read_pretrained(loader, self._place, ways, trust_remote_code=False)
            words = self.model.config.text_config.vocab_size
            if 2 * len(tokenizer) < words:  # transformers makes one of nothing where there are no files
                raise RuntimeError(
                    f"{self._place} has no tokenizer for its {words} tokens (found {len(tokenizer)}); it needs {ways}"
                )
            self._tokenizer = tokenizer
        length = self.model.config.text_config.max_position_embeddings
        if self.pooled:  # trained on texts in small letters, padded to the full length, none of them masked
            texts = [text.lower() for text in texts]
        padding = "max_length" if self.pooled else True
        tokens = self._tokenizer(texts, padding=padding, truncation=True, max_length=length, return_tensors="pt")
        wanted = ("input_ids",) if self.pooled else ("input_ids", "attention_mask")
        output = self.model.get_text_features(**{name: tokens[name].to(self.device) for name in wanted})
        return output if isinstance(output, torch.Tensor) else output.pooler_output


def load(name, weights="auto"):
    """Load a model of images and texts from the Hugging Face hub or a local folder; see `TextEncoder`.

    Args:
        name: "owner/model", a folder with a "/" in its name, or either after "hf:".
        weights: "auto" only; the name says where they are.

    Returns:
        TextEncoder on the CPU, in float32.

    Raises:
        ValueError: `weights` is not "auto". RuntimeError: the model cannot be had, or was not trained with texts in a
            way that gives patches a place among them.
    """
    if str(weights) != "auto":
        raise ValueError(f"weights must be 'auto' for {name}, got {str(weights)!r}; the name says where they are")
    place = name.removeprefix("hf:")
    place = str(expanded(place)) if place.startswith("~") else place
    ways = f"network access or a filled local cache if {place!r} is a model of the hub, else a folder with one"
    transformers = optional_import("transformers")
    config = read_pretrained(transformers.AutoConfig, place, ways, trust_remote_code=False)
    vision = getattr(config, "vision_config", None)
    if vision is None or getattr(config, "text_config", None) is None:
        raise RuntimeError(f"project: {place} ({config.model_type}) has no tower for texts; a CLIP or SigLIP model has")
    model, report = read_pretrained(transformers.AutoModel, place, ways, config=config, output_loading_info=True)
    kind = type(model).__name__
    missing = sorted(report["missing_keys"])
    if missing or report["mismatched_keys"]:
        raise RuntimeError(
            f"{place} does not hold all the weights of its {kind}: missing {missing}, other shapes "
            f"{list(report['mismatched_keys'])}{newer(place)}"
        )
    tower = getattr(model, "vision_model", None)
    if hasattr(model, "get_image_features") and (
        "spatial_shapes" in inspect.signature(model.get_image_features).parameters
    ):
        raise RuntimeError(
            f"project: {place} ({kind}) takes patches cut beforehand (NaFlex); take its variant for a fixed size"
        )
    fits = hasattr(tower, "post_layernorm") and hasattr(model, "get_text_features")
    if not fits or not (hasattr(model, "visual_projection") or hasattr(tower, "head")):
        raise RuntimeError(f"project: {place} ({kind}) is neither of CLIP's kind nor of SigLIP's")
    mean, std, note = huggingface.normalisation(place)
    pooled = not hasattr(model, "visual_projection")
    dim = vision.hidden_size if pooled else model.visual_projection.out_features
    return TextEncoder(
        name,
        model.float().eval(),
        place,
        source=f"{kind} weights from Hugging Face, in the space of texts: {place} ({note})",
        patch_size=vision.patch_size,
        dim=dim,
        num_layers=vision.num_hidden_layers,
        mean=mean,
        std=std,
    )
