"""The rows of tasks whose input is pictures or video alone."""

from __future__ import annotations

from pipefleet.tasks.checks import Check, boolean, choice, either, integer, list_of, mapping_of, null, number, text
from pipefleet.tasks.shared import ACTIVATION, LABEL_COUNT, STRICT_MEDIA, THRESHOLD
from pipefleet.tasks.spec import Media, TaskSpec

_EDGE = integer(1, 4096)
_SIZE = either(
    _EDGE, mapping_of({name: _EDGE for name in ("height", "width", "shortest_edge", "longest_edge")}), list_of(_EDGE, 2)
)
_CHANNELS = either(number(-1e6, 1e6), list_of(number(-1e6, 1e6), 4))
_IMAGE_PROCESSOR: dict[str, Check] = {
    "size": _SIZE,
    "crop_size": _SIZE,
    "resample": integer(0, 5),
    "do_resize": boolean,
    "do_center_crop": boolean,
    "do_rescale": boolean,
    "do_normalize": boolean,
    "do_convert_rgb": boolean,
    "rescale_factor": number(0.0, 1000.0),
    "image_mean": _CHANNELS,
    "image_std": _CHANNELS,
}
"""Arguments of an image processor that change the picture within bounds."""

ROWS = (
    TaskSpec(
        name="depth-estimation",
        media=Media.IMAGE,
        parameters={},
        returns="{predicted_depth: array of the picture's size, depth: image}",
        tensors=("predicted_depth",),
    ),
    TaskSpec(
        name="image-classification",
        media=Media.IMAGE,
        parameters={"top_k": LABEL_COUNT, "function_to_apply": ACTIVATION},
        returns="[{label, score}]",
    ),
    TaskSpec(
        name="image-feature-extraction",
        media=Media.IMAGE,
        parameters={
            "pool": either(null, boolean),
            "image_processor_kwargs": mapping_of(_IMAGE_PROCESSOR),
            "out_indices": either(null, list_of(integer(-1000, 1000), 100)),
            "out_features": either(null, list_of(text(100), 100)),
            "return_tensors": boolean,
        },
        merges=frozenset({"image_processor_kwargs"}),
        returns="[[[number]]] patches by width, [[number]] with pool, a list of feature maps (AutoBackbone's) with out_indices",
        tensors=("",),
    ),
    TaskSpec(
        name="image-segmentation",
        media=Media.IMAGE,
        parameters={
            "subtask": either(null, choice("semantic", "instance", "panoptic")),
            "threshold": THRESHOLD,
            "mask_threshold": THRESHOLD,
            "overlap_mask_area_threshold": THRESHOLD,
        },
        nones=frozenset({"subtask"}),
        returns="[{score, label, mask: image}]",
    ),
    TaskSpec(
        name="image-to-image",
        media=Media.IMAGE,
        parameters={},
        returns="image",
    ),
    TaskSpec(
        name="keypoint-matching",
        media=Media.IMAGE_PAIR,
        positional=("inputs", "threshold"),
        parameters={"threshold": THRESHOLD},
        returns="[{keypoint_image_0: {x, y}, keypoint_image_1: {x, y}, score}]",
        answers_one_alone=True,
    ),
    TaskSpec(
        name="mask-generation",
        media=Media.IMAGE,
        parameters={
            "points_per_batch": either(null, integer(1, 1024)),
            "points_per_crop": integer(1, 128),
            "crops_n_layers": integer(0, 2),
            "crop_overlap_ratio": number(0.0, 0.9),
            "crop_n_points_downscale_factor": integer(1, 16),
            "pred_iou_thresh": number(-1000.0, 1000.0),
            "stability_score_thresh": number(-1.0, 1.0),
            "stability_score_offset": number(0.0, 1000.0),
            "mask_threshold": number(-1000.0, 1000.0),
            "crops_nms_thresh": number(0.0, 1.0),
            "output_rle_mask": boolean,
            "output_bboxes_mask": boolean,
        },
        nones=frozenset({"points_per_batch", "output_rle_mask", "output_bboxes_mask"}),
        returns="{masks: [array of booleans], scores: array, rle_mask?, bounding_boxes?}",
        tensors=("scores", "bounding_boxes"),
    ),
    TaskSpec(
        name="object-detection",
        media=Media.IMAGE,
        parameters={"threshold": THRESHOLD},
        returns="[{score, label, box: {xmin, ymin, xmax, ymax}}]",
    ),
    TaskSpec(
        name="video-classification",
        media=Media.VIDEO,
        parameters={
            "top_k": LABEL_COUNT,
            "function_to_apply": either(null, choice("softmax", "sigmoid", "none")),
            "num_frames": either(null, integer(1, 1024)),
            "frame_sampling_rate": either(null, integer(1, 1000)),
            **STRICT_MEDIA,
        },
        returns="[{score, label}]",
    ),
)
