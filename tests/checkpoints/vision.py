"""Vision checkpoints: inputs of one size (ViT, SegFormer ...) and of the image's own (DETR, GLPN ...)."""

from pathlib import Path
from typing import Any

import transformers as hf

from tests.checkpoints import inputs
from tests.checkpoints.parts import NO_DROPOUT, STACK, amplify, image_processor, labels, save, set_bias
from tests.checkpoints.registry import checkpoint

VIT: dict[str, Any] = {**STACK, **NO_DROPOUT, "image_size": 32, "patch_size": 8}
SQUARE_32 = {"height": 32, "width": 32}
SQUARE_64 = {"height": 64, "width": 64}
SHORT_64 = {"shortest_edge": 64, "longest_edge": 128}

_STAGES = ["stage1", "stage2", "stage3", "stage4"]
_PYRAMID: dict[str, Any] = {
    **NO_DROPOUT,
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [8, 16, 16, 32],
    "num_attention_heads": [1, 2, 2, 4],
    "drop_path_rate": 0.0,
    "initializer_range": 0.2,
}


@checkpoint("image-classification", inputs=inputs.images)
def vit(directory: Path) -> None:
    config = hf.ViTConfig(**VIT, **labels("cat", "dog", "car", "tree", "house", "boat"))
    model = amplify(hf.ViTForImageClassification(config), "classifier", 3.0)
    save(directory, model, image_processor("ViTImageProcessor", size=SQUARE_32))


@checkpoint("image-classification:convbn", inputs=inputs.images)
def resnet(directory: Path) -> None:
    """ResNet: batch norm uses running statistics when evaluated, so batching is exact all the same."""
    config = hf.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        layer_type="basic",
        out_features=None,
        **labels("cat", "dog", "car"),
    )
    processor = image_processor("ConvNextImageProcessor", size={"shortest_edge": 64}, crop_pct=0.875)
    save(directory, hf.ResNetForImageClassification(config), processor)


@checkpoint("image-feature-extraction", inputs=inputs.images)
def image_embeddings(directory: Path) -> None:
    save(directory, hf.ViTModel(hf.ViTConfig(**VIT)), image_processor("ViTImageProcessor", size=SQUARE_32))


@checkpoint("image-segmentation", inputs=inputs.images)
def segformer(directory: Path) -> None:
    """SegFormer: semantic masks from images of one size."""
    config = hf.SegformerConfig(
        **_PYRAMID,
        **labels("wall", "floor", "person", "sky"),
        num_encoder_blocks=4,
        sr_ratios=[8, 4, 2, 1],
        decoder_hidden_size=16,
        classifier_dropout_prob=0.0,
    )
    model = amplify(hf.SegformerForSemanticSegmentation(config), "classifier", 4.0)
    save(directory, model, image_processor("SegformerImageProcessor", size=SQUARE_64))


@checkpoint("image-segmentation:panoptic", inputs=inputs.images, parameters={"threshold": 0.3})
def maskformer(directory: Path) -> None:
    """MaskFormer: scored segments, a pixel mask, and images that keep their own size."""
    config = hf.MaskFormerConfig(
        backbone_config=_swin(),
        decoder_config=_mask_decoder(),
        fpn_feature_size=32,
        mask_feature_size=32,
        init_std=0.2,
        **labels("thing", "stuff", "person"),
    )
    model = amplify(hf.MaskFormerForInstanceSegmentation(config), "class_predictor", 6.0)
    set_bias(model.class_predictor.bias, [4.0, 4.5, 5.0, -6.0])
    settings = {"size_divisor": 32, "ignore_index": 255, "num_labels": 3}
    save(directory, model, image_processor("MaskFormerImageProcessor", size=SHORT_64, **settings))


def _swin() -> Any:
    return hf.SwinConfig(
        image_size=64,
        patch_size=4,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        drop_path_rate=0.0,
        out_features=_STAGES,
    )


def _mask_decoder() -> Any:
    from transformers.models.maskformer.configuration_maskformer import MaskFormerDetrConfig

    return MaskFormerDetrConfig(**_DETR, d_model=16, num_queries=6)


_DETR: dict[str, Any] = {
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "dropout": 0.0,
    "init_std": 0.2,
}


@checkpoint("object-detection", inputs=inputs.images)
def detr(directory: Path) -> None:
    """DETR: a ResNet under images of their own size, padded with a pixel mask that the ResNet ignores."""
    backbone = hf.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=_STAGES,
    )
    config = hf.DetrConfig(
        **_DETR,
        **labels("cat", "remote", "couch"),
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
        d_model=32,
        num_queries=8,
    )
    model = amplify(hf.DetrForObjectDetection(config), "class_labels_classifier", 3.0)
    set_bias(model.class_labels_classifier.bias, [1.0, 2.0, 1.5, -4.0])
    save(directory, model, image_processor("DetrImageProcessor", size=SHORT_64))


@checkpoint("object-detection:fixed", inputs=inputs.images)
def yolos(directory: Path) -> None:
    """YOLOS with a square resize: every image has the same size."""
    sizes = {**VIT, "image_size": [64, 64], "patch_size": 16}
    config = hf.YolosConfig(**sizes, **labels("cat", "remote", "couch"), num_detection_tokens=8)
    model = amplify(hf.YolosForObjectDetection(config), "class_labels_classifier", 3.0)
    amplify(model, "bbox_predictor", 3.0)
    set_bias(model.class_labels_classifier.layers[-1].bias, [1.0, 2.0, 1.5, -4.0])
    save(directory, model, image_processor("YolosImageProcessor", size=SQUARE_64, do_pad=False))


@checkpoint("depth-estimation", inputs=inputs.images)
def dpt(directory: Path) -> None:
    sizes = {**VIT, "num_hidden_layers": 4, "image_size": 64, "patch_size": 16}
    config = hf.DPTConfig(
        **sizes,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 16, 16],
        fusion_hidden_size=8,
        is_hybrid=False,
        backbone_config=None,
    )
    settings = {"keep_aspect_ratio": False, "ensure_multiple_of": 1}
    processor = image_processor("DPTImageProcessor", size=SQUARE_64, **settings)
    save(directory, hf.DPTForDepthEstimation(config), processor)


@checkpoint("depth-estimation:dynamic", inputs=inputs.images)
def glpn(directory: Path) -> None:
    """GLPN: every image keeps its own size, rounded to 32."""
    model = hf.GLPNForDepthEstimation(hf.GLPNConfig(**_PYRAMID, decoder_hidden_size=8))
    save(directory, model, image_processor("GLPNImageProcessor", size_divisor=32))


@checkpoint("video-classification", inputs=inputs.videos, parameters={"top_k": 3})
def videomae(directory: Path) -> None:
    """VideoMAE over 8 frames."""
    sizes: dict[str, Any] = {**STACK, "image_size": 32, "patch_size": 8}
    config = hf.VideoMAEConfig(
        **sizes,
        **labels("walking", "swimming", "cooking", "dancing"),
        num_frames=8,
        tubelet_size=2,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=32,
    )
    model = amplify(hf.VideoMAEForVideoClassification(config), "classifier", 3.0)
    crop = {"size": {"shortest_edge": 32}, "crop_size": SQUARE_32}
    save(directory, model, image_processor("VideoMAEImageProcessor", **crop))


@checkpoint(
    "mask-generation",
    inputs=inputs.scenes,
    parameters={
        "points_per_crop": 4,
        "points_per_batch": 6,
        "pred_iou_thresh": -10.0,
        "stability_score_thresh": -1.0,
    },
)
def sam(directory: Path) -> None:
    """SAM; a random model is never sure, so the parameters keep every mask."""
    config = hf.SamConfig(
        vision_config=_SAM_VISION,
        prompt_encoder_config=_SAM_PROMPTS,
        mask_decoder_config=_SAM_MASKS,
        initializer_range=0.2,
    )
    processor = image_processor(
        "SamImageProcessor",
        size={"longest_edge": 64},
        pad_size=SQUARE_64,
        mask_size={"longest_edge": 16},
        mask_pad_size={"height": 16, "width": 16},
    )
    save(directory, hf.SamModel(config), processor)


_SAM_VISION: dict[str, Any] = {
    **STACK,
    "output_channels": 16,
    "image_size": 64,
    "patch_size": 8,
    "window_size": 4,
    "global_attn_indexes": [1],
    "mlp_dim": 64,
    "num_pos_feats": 8,
}
_SAM_PROMPTS: dict[str, Any] = {
    "hidden_size": 16,
    "image_size": 64,
    "patch_size": 8,
    "mask_input_channels": 4,
    "num_point_embeddings": 4,
}
_SAM_MASKS: dict[str, Any] = {
    "hidden_size": 16,
    "mlp_dim": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "attention_downsample_rate": 2,
    "iou_head_hidden_dim": 16,
    "iou_head_depth": 2,
    "num_multimask_outputs": 3,
}


@checkpoint("keypoint-matching", inputs=inputs.image_pairs, parameters={"threshold": 0.0})
def superglue(directory: Path) -> None:
    """SuperGlue over SuperPoint: two images an input, up to 24 key points each."""
    detector = hf.SuperPointConfig(
        encoder_hidden_sizes=[8, 8, 16, 16],
        decoder_hidden_size=16,
        descriptor_decoder_dim=16,
        keypoint_threshold=0.0,
        max_keypoints=24,
        border_removal_distance=2,
    )
    config = hf.SuperGlueConfig(
        keypoint_detector_config=detector,
        hidden_size=16,
        keypoint_encoder_sizes=[8, 16],
        gnn_layers_types=["self", "cross"],
        num_attention_heads=2,
        sinkhorn_iterations=5,
        initializer_range=0.2,
    )
    processor = image_processor("SuperGlueImageProcessor", size={"height": 64, "width": 80})
    save(directory, hf.SuperGlueForKeypointMatching(config), processor)


@checkpoint("image-to-image", inputs=inputs.small_images)
def swin2sr(directory: Path) -> None:
    """Swin2SR: doubles an image of any size."""
    config = hf.Swin2SRConfig(
        image_size=16,
        embed_dim=12,
        depths=[1, 1],
        num_heads=[2, 2],
        window_size=4,
        mlp_ratio=2.0,
        upscale=2,
        upsampler="pixelshuffledirect",
        drop_path_rate=0.0,
        initializer_range=0.05,
    )
    processor = image_processor("Swin2SRImageProcessor", size_divisor=4)
    save(directory, hf.Swin2SRForImageSuperResolution(config), processor)
