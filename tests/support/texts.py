"""Tiny models of images and texts."""

import torch

WORDS = ["[PAD]", "[UNK]", "[BOS]", "[EOS]", "a", "photo", "of", "cat", "dog", "grass"]
TOWER = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
VISION = {**TOWER, "image_size": 48, "patch_size": 16}
TEXT = {**TOWER, "vocab_size": len(WORDS), "max_position_embeddings": 12, "pad_token_id": 0}
ENDS = {"bos_token_id": 2, "eos_token_id": 3}
KINDS = {"CLIP": {"projection_dim": 24}, "MetaClip2": {"projection_dim": 24}, "Siglip": {}}


def saved(folder, kind):
    """A tiny model of images and texts with far from equal random weights, with a tokenizer of ten words."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    torch.manual_seed(0)
    text = {**TEXT, **ENDS, **({"projection_size": 32} if kind == "Siglip" else {})}
    config = getattr(transformers, f"{kind}Config")(vision_config=VISION, text_config=text, **KINDS[kind])
    model = getattr(transformers, f"{kind}Model")(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("[BOS]", 2), ("[EOS]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[BOS] $A [EOS]", special_tokens=ends)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", bos_token="[BOS]", eos_token="[EOS]"
    ).save_pretrained(folder)
    return model
