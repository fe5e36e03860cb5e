"""Checkpoints that join two modalities: CLIP, OwlViT, LLaVA, Qwen2-Audio, BLIP, ViLT, LayoutLM, donut."""

from pathlib import Path
from typing import Any

import transformers as hf

from tests.checkpoints import inputs
from tests.checkpoints.parts import (
    STACK,
    amplify,
    bert_sizes,
    image_processor,
    labels,
    save,
    set_bias,
    token_ids,
)
from tests.checkpoints.registry import checkpoint
from tests.checkpoints.text import llama_config
from tests.checkpoints.vision import SQUARE_32, VIT
from tests.checkpoints.vocabularies import CHATML, bert_tokenizer, chat_tokenizer, clip_tokenizer

_PATCHES: dict[str, Any] = {**STACK, "image_size": 32, "patch_size": 8, "projection_dim": 16}
_CROP_32: dict[str, Any] = {"size": {"shortest_edge": 32}, "crop_size": SQUARE_32}
_ANSWER = {"generate_kwargs": inputs.GREEDY}
_SIGLIP_LABELS = {"candidate_labels": ["a cat", "a dog", "a red boat"]}


def _clip_towers(tokenizer: Any) -> dict[str, Any]:
    text = {
        **STACK,
        **token_ids(tokenizer),
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        "projection_dim": 16,
        "initializer_factor": 8.0,
    }
    return {"text_config": text, "vision_config": {**_PATCHES, "initializer_factor": 8.0}}


@checkpoint(
    "zero-shot-image-classification",
    inputs=inputs.images,
    parameters={"candidate_labels": ["a cat", "a dog", "a red boat"]},
)
def clip(directory: Path) -> None:
    tokenizer = clip_tokenizer()
    model = hf.CLIPModel(hf.CLIPConfig(**_clip_towers(tokenizer), projection_dim=16))
    save(directory, model, tokenizer, image_processor("CLIPImageProcessor", **_CROP_32))


@checkpoint("zero-shot-image-classification:siglip", inputs=inputs.few_images, parameters=_SIGLIP_LABELS)
def siglip(directory: Path) -> None:
    """SigLIP: texts of 64 tokens always, scores by a sigmoid with a bias."""
    tokenizer = clip_tokenizer(64, pad_token="!")
    text = {**STACK, "vocab_size": len(tokenizer), "max_position_embeddings": 64, "projection_size": 32}
    vision = {**STACK, "image_size": 32, "patch_size": 8}
    model = hf.SiglipModel(hf.SiglipConfig(text_config=text, vision_config=vision))
    set_bias(model.logit_scale, 1.5)
    set_bias(model.logit_bias, -0.5)
    save(directory, model, tokenizer, image_processor("SiglipImageProcessor", size=SQUARE_32))


@checkpoint(
    "zero-shot-object-detection",
    inputs=inputs.images_to_search,
    parameters={"threshold": 0.01, "top_k": 6},
)
def owlvit(directory: Path) -> None:
    """One chunk per label; the class head compares with text features of the text width."""
    tokenizer = clip_tokenizer(16, pad_token="!")
    config = hf.OwlViTConfig(**_clip_towers(tokenizer), projection_dim=32, logit_scale_init_value=2.0)
    model = amplify(hf.OwlViTForObjectDetection(config), "class_head.logit_shift", 5.0)
    processor = image_processor("OwlViTImageProcessor", size=SQUARE_32, do_center_crop=False)
    save(directory, model, tokenizer, processor)


@checkpoint("image-text-to-text", inputs=inputs.image_chats, parameters=_ANSWER)
def llava(directory: Path) -> None:
    """LLaVA: CLIP's vision tower and a Llama, 16 image tokens a picture, a chat template with images."""
    tokenizer = chat_tokenizer(extra=["<image>"])
    config = hf.LlavaConfig(
        vision_config={**_PATCHES, "model_type": "clip_vision_model"},
        text_config=llama_config(tokenizer).to_dict(),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
    )
    model = hf.LlavaForConditionalGeneration(config)
    model.generation_config.update(**token_ids(tokenizer))
    processor = hf.LlavaProcessor(
        image_processor=image_processor("CLIPImageProcessor", **_CROP_32),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=CHATML,
    )
    save(directory, model, processor)


@checkpoint("any-to-any", inputs=inputs.audio_chats, parameters=_ANSWER)
def qwen2_audio(directory: Path) -> None:
    """Qwen2-Audio: sounds and text to text; an any-to-any model with vision would need torchvision."""
    tokenizer = chat_tokenizer(extra=["<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"])
    language = hf.Qwen2Config(
        **STACK,
        **token_ids(tokenizer),
        vocab_size=len(tokenizer),
        num_key_value_heads=2,
        max_position_embeddings=2048,
    )
    config = hf.Qwen2AudioConfig(
        audio_config=_QWEN2_ENCODER,
        text_config=language.to_dict(),
        audio_token_index=tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
    )
    model = hf.Qwen2AudioForConditionalGeneration(config)
    model.generation_config.update(**token_ids(tokenizer))
    extractor = hf.WhisperFeatureExtractor(feature_size=16)
    processor = hf.Qwen2AudioProcessor(feature_extractor=extractor, tokenizer=tokenizer, chat_template=CHATML)
    save(directory, model, processor)


_QWEN2_ENCODER: dict[str, Any] = {
    "model_type": "qwen2_audio_encoder",
    "d_model": 32,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "num_mel_bins": 16,
    "max_source_positions": 1500,
    "initializer_range": 0.2,
}


@checkpoint("image-to-text", inputs=inputs.captions, parameters=_ANSWER)
def blip(directory: Path) -> None:
    """BLIP captions: its tokenizer pads on the right, in front of a decoder."""
    config, processor = _blip_parts()
    save(directory, hf.BlipForConditionalGeneration(config), processor)


def _blip_parts() -> tuple[Any, Any]:
    """Config and processor of a BLIP."""
    tokenizer = bert_tokenizer(64)
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    text = {
        **STACK,
        "vocab_size": len(tokenizer),
        "encoder_hidden_size": 32,
        "projection_dim": 16,
        "max_position_embeddings": 64,
        **token_ids(tokenizer, "bos", "pad", "sep"),
        "eos_token_id": tokenizer.sep_token_id,
    }
    config = hf.BlipConfig(text_config=text, vision_config=_PATCHES, projection_dim=16, image_text_hidden_size=16)
    processor = hf.BlipProcessor(image_processor("BlipImageProcessor", size=SQUARE_32), tokenizer)
    return config, processor


@checkpoint("image-to-text:vit-gpt2", inputs=inputs.few_images, parameters=_ANSWER)
def vit_gpt2(directory: Path) -> None:
    """A vision encoder-decoder without a processor file, as older captioning checkpoints are laid out."""
    tokenizer = chat_tokenizer(64)
    encoder = hf.ViTConfig(**{**VIT, "num_hidden_layers": 1})
    decoder = hf.GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        add_cross_attention=True,
        is_decoder=True,
        initializer_range=0.2,
        **token_ids(tokenizer, "bos", "eos"),
    )
    config = hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    model = amplify(hf.VisionEncoderDecoderModel(config), "crossattention", 4.0)
    _begin_with(model, tokenizer, max_length=16)
    save(directory, model, tokenizer, image_processor("ViTImageProcessor", size=SQUARE_32))


def _begin_with(model: Any, tokenizer: Any, **generation: Any) -> None:
    """Let an encoder-decoder start with the tokenizer's bos token, in both of its configs."""
    model.config.decoder_start_token_id = tokenizer.bos_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.update(decoder_start_token_id=tokenizer.bos_token_id, **token_ids(tokenizer), **generation)


@checkpoint("visual-question-answering", inputs=inputs.image_questions)
def vilt(directory: Path) -> None:
    """ViLT: pictures of their own size, with a pixel mask that makes padding exact."""
    tokenizer = bert_tokenizer(40)
    sizes = {**STACK, "image_size": 64, "patch_size": 16}
    config = hf.ViltConfig(
        **sizes,
        **labels("yes", "no", "red", "two", "dog", "nothing"),
        vocab_size=len(tokenizer),
        max_position_embeddings=40,
        max_image_length=-1,
    )
    model = amplify(hf.ViltForQuestionAnswering(config), "classifier", 2.0)
    pixels = image_processor("ViltImageProcessor", size={"shortest_edge": 64}, size_divisor=16)
    save(directory, model, hf.ViltProcessor(pixels, tokenizer))


@checkpoint("visual-question-answering:blip", inputs=inputs.image_questions, parameters={"max_new_tokens": 5})
def blip_vqa(directory: Path) -> None:
    """BLIP that writes its answers; its decoder looks at all places of the question, padding included."""
    config, processor = _blip_parts()
    save(directory, hf.BlipForQuestionAnswering(config), processor)


@checkpoint("document-question-answering", inputs=inputs.documents, parameters={"top_k": 2})
def layoutlm(directory: Path) -> None:
    """LayoutLM over words and boxes; 64 tokens, so that a full page becomes several chunks."""
    tokenizer = bert_tokenizer(64)
    sizes = bert_sizes(tokenizer, hidden_size=16, max_2d_position_embeddings=1024)
    model = hf.LayoutLMForQuestionAnswering(hf.LayoutLMConfig(**sizes))
    save(directory, amplify(model, "qa_outputs", 3.0), tokenizer)


@checkpoint("document-question-answering:donut", inputs=inputs.documents_without_words)
def donut(directory: Path) -> None:
    """Donut: reads the page itself and continues a prompt, padded on the right."""
    tags = ["<s_docvqa>", "<s_question>", "</s_question>", "<s_answer>", "</s_answer>"]
    tokenizer = chat_tokenizer(64, extra=tags, padding_side="right")
    encoder = hf.DonutSwinModel(hf.DonutSwinConfig(**_DONUT_SWIN))
    model = hf.VisionEncoderDecoderModel(encoder=encoder, decoder=hf.MBartForCausalLM(_donut_decoder(tokenizer)))
    # This pipeline drops the generation arguments of a call, so the limit stands in the checkpoint; the end
    # tag is forced because the pipeline answers None to a text without it.
    end = tokenizer.convert_tokens_to_ids("</s_answer>")
    _begin_with(model, tokenizer, forced_eos_token_id=end, max_new_tokens=10)
    size = {"height": 64, "width": 48}
    processor = image_processor("DonutImageProcessor", size=size, do_align_long_axis=False)
    save(directory, model, tokenizer, processor)


_DONUT_SWIN: dict[str, Any] = {
    "image_size": [64, 48],
    "patch_size": 4,
    "embed_dim": 8,
    "depths": [1, 1],
    "num_heads": [1, 2],
    "window_size": 4,
    "drop_path_rate": 0.0,
    "initializer_range": 0.2,
}


def _donut_decoder(tokenizer: Any) -> Any:
    # encoder_layers as well: the generation cache is sized by num_hidden_layers, which is its alias.
    return hf.MBartConfig(
        vocab_size=len(tokenizer),
        d_model=16,
        decoder_layers=2,
        encoder_layers=2,
        decoder_attention_heads=2,
        encoder_attention_heads=2,
        decoder_ffn_dim=32,
        encoder_ffn_dim=32,
        max_position_embeddings=64,
        is_decoder=True,
        add_cross_attention=True,
        is_encoder_decoder=False,
        init_std=0.2,
        dropout=0.0,
        **token_ids(tokenizer),
        decoder_start_token_id=tokenizer.bos_token_id,
        forced_eos_token_id=None,
    )
