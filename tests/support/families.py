"""Vision models of transformers, tiny, at random weights, one for each family or variant; and an oracle of place."""

import torch
from torch.nn import functional as F

TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 50,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VIT = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 48,
    "patch_size": 16,
}
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
LANGUAGE = {**SMALL, "num_key_value_heads": 1, "vocab_size": 50}
STAGES = {"hidden_sizes": [8, 12, 16, 24], "depths": [1, 1, 1, 1]}
SWIN = {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 3, "image_size": 96}


def made(kind, **settings):
    """A function of transformers that gives `kind`Model of `kind`Config(**settings)."""
    return lambda t: getattr(t, f"{kind}Model")(getattr(t, f"{kind}Config")(**settings))


def task(model, config, **settings):
    return lambda t: getattr(t, model)(getattr(t, config)(**settings))


def towers(kind, text=None, **vision):
    """A model of pictures and texts; what is loaded of it is its vision tower."""

    def make(t):
        settings = {"vision_config": {**VIT, **vision}, "text_config": {**TEXT, **(text or {})}}
        return getattr(t, f"{kind}Model")(getattr(t, f"{kind}Config")(**settings, projection_dim=16))

    return make


def timm_wrapper(architecture):
    return task("TimmWrapperModel", "TimmWrapperConfig", architecture=architecture, do_pooling=False)


FAMILIES = {
    "vit": made("ViT", **VIT),
    "vit-classifier": task("ViTForImageClassification", "ViTConfig", **VIT),
    "deit": made("DeiT", **VIT),
    "deit-teacher": task("DeiTForImageClassificationWithTeacher", "DeiTConfig", **VIT),
    "beit": made("Beit", **VIT),
    "beit-relative": made("Beit", **VIT, use_relative_position_bias=True),
    "beit-shared": made("Beit", **VIT, use_shared_relative_position_bias=True),
    "beit-segmentation": task(
        "BeitForSemanticSegmentation", "BeitConfig", **{**VIT, "num_hidden_layers": 4}, out_indices=[0, 1, 2, 3]
    ),
    "data2vec": made("Data2VecVision", **VIT, use_relative_position_bias=True),
    "dinov2": made("Dinov2", **VIT),
    "dinov2-classifier": task("Dinov2ForImageClassification", "Dinov2Config", **VIT),
    "dinov2-backbone": task("Dinov2Backbone", "Dinov2Config", **VIT),
    "dinov2-registers": made("Dinov2WithRegisters", **VIT),
    "dinov3-vit": made("DINOv3ViT", **VIT, num_register_tokens=4),
    "dinov3-vit-backbone": task("DINOv3ViTBackbone", "DINOv3ViTConfig", **VIT, num_register_tokens=4),
    "dinov3-convnext": made("DINOv3ConvNext", **STAGES),
    "radio": made("Radio", **VIT),
    "vit-mae": made(
        "ViTMAE",
        **VIT,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
    ),
    "vit-mae-pretraining": task(
        "ViTMAEForPreTraining",
        "ViTMAEConfig",
        **VIT,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
    ),
    "vit-msn": made("ViTMSN", **VIT),
    "ijepa": made("IJepa", **VIT),
    "pixio": made("Pixio", **VIT),
    "hiera": made(
        "Hiera",
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        image_size=[64, 64],
        masked_unit_size=[8, 8],
        query_stride=[2, 2],
        num_query_pool=3,
        patch_stride=[4, 4],
    ),
    "swin": made("Swin", **SWIN),
    "swin-backbone": task("SwinBackbone", "SwinConfig", **SWIN, out_features=["stage1", "stage4"]),
    "swin-classifier": task("SwinForImageClassification", "SwinConfig", **SWIN),
    "swinv2": made("Swinv2", **SWIN),
    "swin2sr": made("Swin2SR", embed_dim=12, depths=[1, 1], num_heads=[2, 2], window_size=4, image_size=16),
    "maskformer-swin": made("MaskFormerSwin", **SWIN),
    "donut-swin": made("DonutSwin", **SWIN),
    "convnext": made("ConvNext", **STAGES),
    "convnextv2": made("ConvNextV2", **STAGES),
    "upernet": lambda t: t.UperNetForSemanticSegmentation(
        t.UperNetConfig(
            backbone_config=t.ConvNextConfig(**STAGES, out_features=["stage1", "stage2", "stage3", "stage4"]),
            hidden_size=16,
            auxiliary_channels=8,
            pool_scales=[1, 2],
            num_labels=2,
            auxiliary_in_channels=16,
        )
    ),
    "resnet": made("ResNet", embedding_size=8, layer_type="basic", **STAGES),
    "resnet-classifier": task(
        "ResNetForImageClassification", "ResNetConfig", embedding_size=8, layer_type="basic", **STAGES
    ),
    "regnet": made("RegNet", embedding_size=8, groups_width=4, **STAGES),
    "bit": made("Bit", embedding_size=8, num_groups=4, hidden_sizes=[16, 32, 32, 64], depths=[1] * 4),
    "efficientnet": made("EfficientNet", width_coefficient=0.25, depth_coefficient=0.3, hidden_dim=320),
    "mobilenet-v1": made("MobileNetV1", depth_multiplier=0.25),
    "mobilenet-v2": made("MobileNetV2", depth_multiplier=0.25),
    "mobilevit": made(
        "MobileViT",
        hidden_sizes=[16, 24, 32],
        neck_hidden_sizes=[4, 8, 16, 24, 24, 32, 48],
        num_attention_heads=2,
        image_size=64,
    ),
    "mobilevit-segmentation": task(
        "MobileViTForSemanticSegmentation",
        "MobileViTConfig",
        hidden_sizes=[16, 24, 32],
        neck_hidden_sizes=[4, 8, 16, 24, 24, 32, 48],
        num_attention_heads=2,
        image_size=64,
        aspp_out_channels=8,
    ),
    "mobilevitv2": made(
        "MobileViTV2", width_multiplier=0.25, base_attn_unit_dims=[32, 48, 64], n_attn_blocks=[1, 1, 1], image_size=64
    ),
    "pvt": made(
        "Pvt",
        hidden_sizes=[8, 12, 16, 24],
        depths=[1] * 4,
        num_attention_heads=[1, 1, 2, 2],
        image_size=128,
        mlp_ratios=[2] * 4,
    ),
    "pvt-v2": made(
        "PvtV2",
        hidden_sizes=[8, 12, 16, 24],
        depths=[1] * 4,
        num_attention_heads=[1, 1, 2, 2],
        image_size=64,
        mlp_ratios=[2] * 4,
    ),
    "segformer": made(
        "Segformer",
        hidden_sizes=[8, 12, 16, 24],
        depths=[1] * 4,
        num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=16,
    ),
    "segformer-segmentation": task(
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        hidden_sizes=[8, 12, 16, 24],
        depths=[1] * 4,
        num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=16,
    ),
    "glpn": made(
        "GLPN", hidden_sizes=[8, 12, 16, 24], depths=[1] * 4, num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=16
    ),
    "glpn-depth": task(
        "GLPNForDepthEstimation",
        "GLPNConfig",
        hidden_sizes=[8, 12, 16, 24],
        depths=[1] * 4,
        num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=16,
    ),
    "poolformer": made("PoolFormer", **STAGES),
    "levit": made(
        "Levit",
        image_size=192,
        hidden_sizes=[16, 24, 32],
        num_attention_heads=[1, 1, 2],
        depths=[1, 1, 1],
        key_dim=[8, 8, 8],
        down_ops=[["Subsample", 8, 2, 2, 2, 2], ["Subsample", 8, 2, 2, 2, 2]],
        attention_ratio=[2, 2, 2],
        mlp_ratio=[2, 2, 2],
    ),
    "cvt": made("Cvt", embed_dim=[8, 12, 24], num_heads=[1, 1, 2], depth=[1, 2, 3]),
    "focalnet": made("FocalNet", embed_dim=8, depths=[1, 1, 1, 1], image_size=64),
    "swiftformer": made("SwiftFormer", embed_dims=[8, 12, 16, 24], depths=[1, 1, 1, 1], image_size=64),
    "aimv2": made("Aimv2Vision", **{k: v for k, v in VIT.items()}),
    "aimv2-native": made("Aimv2Vision", **VIT, is_native=True),
    "aimv2-lit": lambda t: t.Aimv2Model(t.Aimv2Config(vision_config=VIT, text_config={**TEXT}, projection_dim=16)),
    "clip": towers("CLIP"),
    "clip-vision": made("CLIPVision", **VIT),
    "clip-vision-projected": task("CLIPVisionModelWithProjection", "CLIPVisionConfig", **VIT, projection_dim=16),
    "metaclip-2": towers("MetaClip2"),
    "metaclip-2-vision": made("MetaClip2Vision", **VIT),
    "siglip": towers("Siglip"),
    "siglip-vision": made("SiglipVision", **VIT),
    "siglip-odd": made("SiglipVision", **{**VIT, "image_size": 50}),
    "altclip": towers("AltCLIP", {"project_dim": 16, "pad_token_id": 1, "max_position_embeddings": 40}),
    "chinese-clip": towers("ChineseCLIP", {"pad_token_id": 0}),
    "clipseg": towers("CLIPSeg"),
    "clipseg-segmentation": lambda t: t.CLIPSegForImageSegmentation(
        t.CLIPSegConfig(
            vision_config=VIT,
            text_config=TEXT,
            extract_layers=[0, 1, 2],
            reduce_dim=8,
            decoder_num_attention_heads=2,
            decoder_intermediate_size=8,
            projection_dim=16,
        )
    ),
    "owlvit": towers("OwlViT"),
    "owlv2": towers("Owlv2"),
    "owlv2-detection": lambda t: t.Owlv2ForObjectDetection(
        t.Owlv2Config(vision_config=VIT, text_config=TEXT, projection_dim=16)
    ),
    "blip": towers("Blip", {"max_position_embeddings": 20}),
    "align": lambda t: t.AlignModel(
        t.AlignConfig(
            vision_config=dict(width_coefficient=0.25, depth_coefficient=0.3, hidden_dim=320),
            text_config=TEXT,
            projection_dim=16,
        )
    ),
    "flava": lambda t: t.FlavaModel(
        t.FlavaConfig(
            image_config=VIT,
            text_config=TEXT,
            multimodal_config={k: v for k, v in TEXT.items() if "id" not in k and "vocab" not in k},
            image_codebook_config=dict(hidden_size=4, num_groups=1),
        )
    ),
    "flava-image": made("FlavaImage", **VIT),
    "idefics2-vision": lambda t: t.models.idefics2.modeling_idefics2.Idefics2VisionTransformer(
        t.models.idefics2.configuration_idefics2.Idefics2VisionConfig(**VIT)
    ),
    "internvl-vision": made(
        "InternVLVision",
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=[48, 48],
        patch_size=[16, 16],
    ),
    "mlcd": made("MLCDVision", **VIT),
    "sam-vision": made(
        "SamVision",
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        mlp_dim=48,
        image_size=96,
        patch_size=16,
        output_channels=16,
        window_size=2,
        global_attn_indexes=[2],
    ),
    "sam": lambda t: t.SamModel(
        t.SamConfig(
            vision_config=dict(
                hidden_size=24,
                num_hidden_layers=3,
                num_attention_heads=2,
                mlp_dim=48,
                image_size=96,
                patch_size=16,
                output_channels=16,
                window_size=2,
                global_attn_indexes=[2],
            ),
            prompt_encoder_config=dict(hidden_size=16, image_size=96, image_embedding_size=6, mask_input_channels=4),
            mask_decoder_config=dict(
                hidden_size=16,
                mlp_dim=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                iou_head_hidden_dim=8,
                iou_head_depth=2,
            ),
        )
    ),
    "sam-hq-vision": made(
        "SamHQVision",
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        mlp_dim=48,
        image_size=96,
        patch_size=16,
        output_channels=16,
        window_size=2,
        global_attn_indexes=[2],
    ),
    "sam2-vision": lambda t: t.Sam2VisionModel(
        t.Sam2VisionConfig(
            backbone_config=t.Sam2HieraDetConfig(
                hidden_size=8,
                num_attention_heads=1,
                image_size=[64, 64],
                blocks_per_stage=[1, 1, 2, 1],
                embed_dim_per_stage=[8, 16, 32, 64],
                num_attention_heads_per_stage=[1, 1, 2, 2],
                window_size_per_stage=[4, 2, 2, 2],
                global_attention_blocks=[3],
                window_positional_embedding_background_size=[4, 4],
            ),
            backbone_channel_list=[64, 32, 16, 8],
            backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]],
            fpn_hidden_size=16,
        )
    ),
    "sam2": lambda t: t.Sam2Model(
        t.Sam2Config(
            vision_config=t.Sam2VisionConfig(
                backbone_config=t.Sam2HieraDetConfig(
                    hidden_size=8,
                    num_attention_heads=1,
                    image_size=[64, 64],
                    blocks_per_stage=[1, 1, 2, 1],
                    embed_dim_per_stage=[8, 16, 32, 64],
                    num_attention_heads_per_stage=[1, 1, 2, 2],
                    window_size_per_stage=[4, 2, 2, 2],
                    global_attention_blocks=[3],
                    window_positional_embedding_background_size=[4, 4],
                ),
                backbone_channel_list=[64, 32, 16, 8],
                backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]],
                fpn_hidden_size=16,
            ),
            prompt_encoder_config=dict(hidden_size=16, image_size=64, mask_input_channels=4),
            mask_decoder_config=dict(
                hidden_size=16,
                mlp_dim=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                iou_head_hidden_dim=8,
                iou_head_depth=2,
            ),
        )
    ),
    "sam2-hiera": lambda t: t.Sam2HieraDetModel(
        t.Sam2HieraDetConfig(
            hidden_size=8,
            num_attention_heads=1,
            image_size=[64, 64],
            blocks_per_stage=[1, 1, 2, 1],
            embed_dim_per_stage=[8, 16, 32, 64],
            num_attention_heads_per_stage=[1, 1, 2, 2],
            window_size_per_stage=[4, 2, 2, 2],
            global_attention_blocks=[3],
            window_positional_embedding_background_size=[4, 4],
        )
    ),
    "sam3-vit": made(
        "Sam3ViT", **{**VIT, "image_size": 64}, window_size=2, global_attn_indexes=[2], pretrain_image_size=48
    ),
    "sam3-vision": lambda t: t.Sam3VisionModel(
        t.Sam3VisionConfig(
            backbone_config=t.Sam3ViTConfig(
                **{**VIT, "image_size": 64}, window_size=2, global_attn_indexes=[2], pretrain_image_size=48
            ),
            fpn_hidden_size=16,
            backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]],
        )
    ),
    "depth-anything": lambda t: t.DepthAnythingForDepthEstimation(
        t.DepthAnythingConfig(
            backbone_config=t.Dinov2Config(
                **VIT, out_features=["stage1", "stage2", "stage3"], reshape_hidden_states=False
            ),
            reassemble_hidden_size=24,
            patch_size=16,
            neck_hidden_sizes=[8, 8, 8],
            reassemble_factors=[2, 1, 0.5],
            fusion_hidden_size=8,
            head_hidden_size=8,
        )
    ),
    "prompt-depth-anything": lambda t: t.PromptDepthAnythingForDepthEstimation(
        t.PromptDepthAnythingConfig(
            backbone_config=t.Dinov2Config(
                **VIT, out_features=["stage1", "stage2", "stage3"], reshape_hidden_states=False
            ),
            reassemble_hidden_size=24,
            patch_size=16,
            neck_hidden_sizes=[8, 8, 8],
            reassemble_factors=[2, 1, 0.5],
            fusion_hidden_size=8,
            head_hidden_size=8,
        )
    ),
    "dpt": made("DPT", **VIT, backbone_out_indices=[0, 1, 2], neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8),
    "dpt-depth": task(
        "DPTForDepthEstimation",
        "DPTConfig",
        **{**VIT, "num_hidden_layers": 4},
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
    ),
    "dpt-dinov2": lambda t: t.DPTForDepthEstimation(
        t.DPTConfig(
            backbone_config=t.Dinov2Config(
                **VIT, out_features=["stage1", "stage2", "stage3"], reshape_hidden_states=False
            ),
            neck_hidden_sizes=[8, 8, 8],
            reassemble_factors=[2, 1, 0.5],
            fusion_hidden_size=8,
        )
    ),
    "zoedepth": lambda t: t.ZoeDepthForDepthEstimation(
        t.ZoeDepthConfig(
            backbone_config=t.BeitConfig(
                **{**VIT, "num_hidden_layers": 4},
                out_features=["stage1", "stage2", "stage3", "stage4"],
                reshape_hidden_states=False,
                use_relative_position_bias=True,
            ),
            neck_hidden_sizes=[8, 8, 8, 8],
            fusion_hidden_size=8,
            bottleneck_features=8,
            num_relative_features=8,
            bin_embedding_dim=8,
            num_attractors=[2, 2, 2, 2],
            num_patch_transformer_layers=1,
            patch_transformer_hidden_size=8,
            patch_transformer_intermediate_size=8,
            patch_transformer_num_attention_heads=2,
        )
    ),
    "vitdet": made(
        "VitDet",
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=64,
        pretrain_image_size=48,
        patch_size=16,
        window_block_indices=[0, 1],
        window_size=2,
        use_relative_position_embeddings=True,
    ),
    "vitdet-plain": made(
        "VitDet",
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=64,
        pretrain_image_size=48,
        patch_size=16,
        window_block_indices=[0, 1],
        window_size=2,
    ),
    "vitpose-backbone": task(
        "VitPoseBackbone",
        "VitPoseBackboneConfig",
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=[64, 48],
        patch_size=[16, 16],
    ),
    "vitpose": lambda t: t.VitPoseForPoseEstimation(
        t.VitPoseConfig(
            backbone_config=t.VitPoseBackboneConfig(
                hidden_size=24,
                num_hidden_layers=3,
                num_attention_heads=2,
                image_size=[64, 48],
                patch_size=[16, 16],
                out_features=["stage3"],
            ),
            num_labels=3,
        )
    ),
    "textnet": made("TextNet", stem_out_channels=8, hidden_sizes=[8, 8, 12, 16, 24]),
    "hgnet-v2": task(
        "HGNetV2Backbone",
        "HGNetV2Config",
        stem_channels=[3, 8, 8],
        stage_in_channels=[8, 8, 16, 24],
        stage_mid_channels=[4, 4, 8, 8],
        stage_out_channels=[8, 16, 24, 32],
        stage_num_blocks=[1, 1, 1, 1],
        stage_numb_of_layers=[2, 2, 2, 2],
        embedding_size=8,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1] * 4,
    ),
    "hgnet-v2-classifier": task(
        "HGNetV2ForImageClassification",
        "HGNetV2Config",
        stem_channels=[3, 8, 8],
        stage_in_channels=[8, 8, 16, 24],
        stage_mid_channels=[4, 4, 8, 8],
        stage_out_channels=[8, 16, 24, 32],
        stage_num_blocks=[1, 1, 1, 1],
        stage_numb_of_layers=[2, 2, 2, 2],
        embedding_size=8,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1] * 4,
    ),
    "rt-detr-resnet": task(
        "RTDetrResNetBackbone", "RTDetrResNetConfig", embedding_size=8, layer_type="basic", **STAGES
    ),
    "eomt": task(
        "EomtForUniversalSegmentation",
        "EomtConfig",
        **VIT,
        num_blocks=1,
        num_queries=4,
        num_upscale_blocks=1,
        num_labels=2,
    ),
    "janus-vision": made("JanusVision", **VIT),
    "tipsv2-vision": made("Tipsv2Vision", **VIT),
    "sapiens2": made("Sapiens2", **VIT),
    "pp-lcnet": task("PPLCNetBackbone", "PPLCNetConfig"),
    "lw-detr-vit": task(
        "LwDetrViTBackbone",
        "LwDetrViTConfig",
        hidden_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=64,
        pretrain_image_size=48,
        patch_size=16,
        window_block_indices=[0, 1],
        cae_init_values=0.1,
        out_indices=[1, 3],
        num_windows=4,
    ),
    "rf-detr-dinov2": task("RfDetrDinov2Backbone", "RfDetrDinov2Config", **VIT, num_windows=2, out_indices=[1, 3]),
    "pixtral": made(
        "PixtralVision",
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=64,
        patch_size=16,
    ),
    "detr": lambda t: t.DetrModel(
        t.DetrConfig(
            backbone_config=t.ResNetConfig(embedding_size=8, layer_type="basic", **STAGES, out_features=["stage4"]),
            use_timm_backbone=False,
            backbone=None,
            d_model=8,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=8,
            decoder_ffn_dim=8,
            num_queries=3,
        )
    ),
    "git-vision": made("GitVision", **VIT),
    "kosmos2-vision": lambda t: t.models.kosmos2.modeling_kosmos2.Kosmos2VisionModel(
        t.models.kosmos2.configuration_kosmos2.Kosmos2VisionConfig(**VIT)
    ),
    "blip2": lambda t: t.Blip2VisionModel(t.Blip2VisionConfig(**VIT)),
    "llava": lambda t: t.LlavaForConditionalGeneration(
        t.LlavaConfig(
            vision_config=t.CLIPVisionConfig(**VIT), text_config=t.LlamaConfig(**LANGUAGE), image_token_index=3
        )
    ),
    "internvl": lambda t: t.InternVLForConditionalGeneration(
        t.InternVLConfig(
            vision_config={**VIT, "image_size": [48, 48], "patch_size": [16, 16]},
            text_config=t.Qwen2Config(**LANGUAGE),
            image_token_id=3,
        )
    ),
    "paligemma": lambda t: t.PaliGemmaForConditionalGeneration(
        t.PaliGemmaConfig(
            vision_config={**VIT, "model_type": "siglip_vision_model", "projection_dim": 16},
            text_config=dict(model_type="gemma", head_dim=8, **LANGUAGE),
            image_token_index=3,
            projection_dim=16,
        )
    ),
    "idefics3": lambda t: t.Idefics3ForConditionalGeneration(
        t.Idefics3Config(vision_config=VIT, text_config=dict(model_type="llama", **LANGUAGE), scale_factor=1)
    ),
    "blip2-whole": lambda t: t.Blip2Model(
        t.Blip2Config(
            vision_config=VIT,
            qformer_config=dict(
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=16,
                vocab_size=50,
                encoder_hidden_size=24,
            ),
            text_config=dict(
                model_type="opt",
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                ffn_dim=16,
                vocab_size=50,
                word_embed_proj_dim=16,
            ),
        )
    ),
    "sam3": lambda t: t.Sam3Model(
        t.Sam3Config(
            vision_config=dict(
                backbone_config=dict(
                    **{**VIT, "image_size": 64},
                    window_size=2,
                    global_attn_indexes=[2],
                    pretrain_image_size=48,
                    model_type="sam3_vit_model",
                ),
                fpn_hidden_size=16,
            ),
            text_config=dict(vocab_size=50, projection_dim=16, **SMALL),
            geometry_encoder_config=dict(num_layers=1, **SMALL),
            detr_encoder_config=dict(num_layers=1, **SMALL),
            detr_decoder_config=dict(num_layers=1, num_queries=4, **SMALL),
            mask_decoder_config=dict(hidden_size=16, num_attention_heads=2),
        )
    ),
    "rt-detr": lambda t: t.RTDetrForObjectDetection(
        t.RTDetrConfig(
            backbone_config=t.RTDetrResNetConfig(
                embedding_size=8, layer_type="basic", **STAGES, out_features=["stage2", "stage3", "stage4"]
            ),
            encoder_hidden_dim=16,
            encoder_in_channels=[12, 16, 24],
            d_model=16,
            num_queries=3,
            encoder_ffn_dim=8,
            decoder_ffn_dim=8,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            decoder_in_channels=[16, 16, 16],
            num_denoising=0,
        )
    ),
    "maskformer": lambda t: t.MaskFormerForInstanceSegmentation(
        t.MaskFormerConfig(
            backbone_config=t.SwinConfig(**SWIN, out_features=["stage1", "stage2", "stage3", "stage4"]),
            decoder_config=t.DetrConfig(
                d_model=32,
                encoder_layers=1,
                decoder_layers=1,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                encoder_ffn_dim=8,
                decoder_ffn_dim=8,
                num_queries=3,
            ),
            fpn_feature_size=32,
            mask_feature_size=32,
        )
    ),
    # with timm only
    "timm-wrapper-vit": timm_wrapper("test_vit"),
    "timm-wrapper-convnext": timm_wrapper("test_convnext"),
    "timm-wrapper-resnet": timm_wrapper("test_resnet"),
    "timm-backbone": task(
        "TimmBackbone",
        "TimmBackboneConfig",
        backbone="test_resnet",
        use_pretrained_backbone=False,
        out_indices=[0, 1, 2, 3],
    ),
}
# models that no grid of features can be had from
REFUSED = {
    "groupvit": towers("GroupViT", depths=[1, 1, 1], num_group_tokens=[4, 2, 0], num_output_groups=[4, 2, 0]),
    "x-clip": towers(
        "XCLIP", mit_hidden_size=16, mit_intermediate_size=16, mit_num_hidden_layers=1, mit_num_attention_heads=2
    ),
    "yolos": made("Yolos", **{**VIT, "image_size": [48, 48]}),
    "seggpt": made("SegGpt", **{**VIT, "image_size": [96, 48], "pretrain_image_size": 48}),
    "siglip2-naflex": lambda t: t.Siglip2VisionModel(
        t.Siglip2VisionConfig(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            num_patches=9,
            patch_size=16,
        )
    ),
    "videomae": made("VideoMAE", **VIT, num_frames=2, tubelet_size=2),
    "vivit": made("Vivit", **VIT, num_frames=2),
    "timesformer": made("Timesformer", **VIT, num_frames=2),
    "vjepa2": made(
        "VJEPA2",
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        crop_size=32,
        patch_size=16,
        frames_per_clip=2,
        tubelet_size=2,
        pred_hidden_size=12,
        pred_num_attention_heads=2,
        pred_num_hidden_layers=1,
    ),
    "imagegpt": made("ImageGPT", n_embd=16, n_layer=1, n_head=2, vocab_size=20, n_positions=16),
    "qwen2-vl": lambda t: t.Qwen2VLModel(
        t.Qwen2VLConfig(
            vision_config=dict(depth=1, embed_dim=16, hidden_size=16, num_heads=2),
            text_config=dict(**LANGUAGE, rope_scaling=dict(type="mrope", mrope_section=[1, 1, 2])),
        )
    ),
    "depth-pro": lambda t: t.DepthProModel(
        t.DepthProConfig(
            fusion_hidden_size=8,
            patch_size=16,
            intermediate_hook_ids=[1, 0],
            intermediate_feature_dims=[8, 8],
            scaled_images_ratios=[0.5, 1.0],
            scaled_images_overlap_ratios=[0.0, 0.2],
            scaled_images_feature_dims=[8, 8],
            use_fov_model=False,
            **{
                f"{part}_model_config": {"model_type": "dinov2", **VIT, "image_size": 32}
                for part in ("image", "patch", "fov")
            },
        )
    ),
}


def alive(model):
    """Weights that let pictures through many layers: products keep the size of what goes in, kernels have a middle."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "position" not in name and parameter.shape[0] > 1:
                fan_in = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)
            if parameter.ndim == 4 and parameter.shape[2] % 2 and parameter.shape[3] % 2:
                parameter[:, :, parameter.shape[2] // 2, parameter.shape[3] // 2] *= 6
    return model.eval()


def changed(image, cell):
    """The pictures that `image` (1, bands, H, W) becomes when one cell of `cell` pixels is changed, for every cell."""
    height, width = (n // cell for n in image.shape[2:])
    pictures = image.repeat(height * width, 1, 1, 1)
    for k, picture in enumerate(pictures):
        row, column = k // width * cell, k % width * cell
        picture[:, row : row + cell, column : column + cell] *= -3
    return pictures


def misreadings(height, width):
    """Other orders in which the cells of a grid could have been laid: name -> place of each cell in raster order."""
    cells = torch.arange(height * width).view(height, width)
    return {
        "by columns": cells.view(width, height).T.flatten(),
        "rows taken for columns": cells.T.flatten(),
        "mirrored": cells.flip(1).flatten(),
        "upside down": cells.flip(0).flatten(),
        "one too early": cells.flatten().roll(1),
        "one too late": cells.flatten().roll(-1),
    }


def margin(features, plain, grid):
    """How clearly a grid of features lies as the picture does: below 1, another reading of it fits better.

    Args:
        features: (h * w, C, k * h, k * w), those of `changed` pictures.
        plain: (1, C, k * h, k * w), those of the picture itself.
        grid: (h, w), cells.

    Returns:
        The least of two things: change in the cells that changed over that in the average cell; and, for every
        misreading, over that where it would lie then.
    """
    height, width = grid
    change = (features.double() - plain.double()).square().sum(1).sqrt()
    if change.shape[1] * width != change.shape[2] * height:
        return 0.0  # the grid does not follow the picture
    change = F.adaptive_avg_pool2d(change, grid).flatten(1)
    change = change / change.sum(1, keepdim=True)
    own = change.diagonal()
    ratios = [own.mean() * len(own)]
    for places in misreadings(height, width).values():
        moved = places != torch.arange(len(places))
        there = change.gather(1, places[:, None])[:, 0]
        ratios.append(own[moved].mean() / there[moved].mean())
    return float(min(ratios))
