"""Audio checkpoints: wav2vec2 with both norms, Whisper, AST, CLAP, VITS and MusicGen."""

from pathlib import Path
from typing import Any

import transformers as hf
from tokenizers import AddedToken

from tests.checkpoints import inputs
from tests.checkpoints.parts import NO_DROPOUT, STACK, amplify, labels, save
from tests.checkpoints.registry import checkpoint
from tests.checkpoints.vocabularies import byte_bpe, from_vocab_file, roberta_tokenizer, t5_tokenizer

_WAV2VEC2: dict[str, Any] = {
    **STACK,
    "conv_dim": (16, 16, 16, 16),
    "conv_stride": (5, 4, 4, 4),
    "conv_kernel": (10, 8, 4, 4),
    "num_feat_extract_layers": 4,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "final_dropout": 0.0,
    "layerdrop": 0.0,
    "mask_time_prob": 0.0,
    "classifier_proj_size": 32,
}

CHUNKED = {"chunk_length_s": 10}
TIMED = {"generate_kwargs": {"max_new_tokens": 12, "num_beams": 1}, "return_timestamps": True}


@checkpoint("automatic-speech-recognition", inputs=inputs.speeches, parameters=CHUNKED)
def ctc_group_norm(directory: Path) -> None:
    """Like wav2vec2-base-960h: group norm runs over padding, and no attention mask says where it is."""
    _save_ctc(directory, masked=False, feat_extract_norm="group")


@checkpoint("automatic-speech-recognition:ctc-masked", inputs=inputs.speeches, parameters=CHUNKED)
def ctc_layer_norm(directory: Path) -> None:
    """Like wav2vec2-large-lv60: layer norm and an attention mask, so padding is exact."""
    _save_ctc(directory, masked=True, feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True)


def _save_ctc(directory: Path, *, masked: bool, **norm: Any) -> None:
    letters = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ'"]
    tokenizer = from_vocab_file(hf.Wav2Vec2CTCTokenizer, _numbered(letters))
    config = hf.Wav2Vec2Config(vocab_size=len(letters), pad_token_id=0, ctc_loss_reduction="mean", **_WAV2VEC2, **norm)
    save(directory, amplify(hf.Wav2Vec2ForCTC(config), "lm_head", 3.0), tokenizer, _waveforms(masked=masked))


def _waveforms(*, masked: bool) -> Any:
    return hf.Wav2Vec2FeatureExtractor(
        feature_size=1,
        sampling_rate=16000,
        padding_value=0.0,
        do_normalize=True,
        return_attention_mask=masked,
    )


def _numbered(tokens: list[str]) -> dict[str, int]:
    return {token: number for number, token in enumerate(tokens)}


@checkpoint("automatic-speech-recognition:whisper", inputs=inputs.speeches, parameters=TIMED)
def whisper(directory: Path) -> None:
    """Multilingual Whisper with all 1,501 timestamps and word alignment heads."""
    tokenizer, ids = _whisper_tokenizer()
    end, start = ids["<|endoftext|>"], ids["<|startoftranscript|>"]
    config = hf.WhisperConfig(
        vocab_size=len(tokenizer),
        num_mel_bins=80,
        d_model=16,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        decoder_start_token_id=start,
        pad_token_id=end,
        bos_token_id=end,
        eos_token_id=end,
        init_std=0.2,
        begin_suppress_tokens=[220, end],
        max_target_positions=448,
    )
    model = hf.WhisperForConditionalGeneration(config)
    model.generation_config = _whisper_generation(config, ids)
    save(directory, model, tokenizer, hf.WhisperFeatureExtractor(feature_size=80))


def _whisper_tokenizer() -> tuple[Any, dict[str, int]]:
    # Whisper finds the timestamps by their ids: they must follow <|notimestamps|> directly.
    vocab, merges = byte_bpe(320)
    vocab["<|endoftext|>"] = len(vocab)
    tokenizer = hf.WhisperTokenizer(vocab=vocab, merges=merges, pad_token="<|endoftext|>", model_max_length=448)
    names = "startoftranscript en de fr translate transcribe startoflm startofprev nospeech notimestamps"
    special = [f"<|{name}|>" for name in names.split()]
    tokenizer.add_special_tokens({"extra_special_tokens": special})
    stamps = [f"<|{i * 0.02:.2f}|>" for i in range(1501)]
    tokenizer.add_tokens([AddedToken(stamp, special=False, normalized=False) for stamp in stamps])
    return tokenizer, {name: tokenizer.convert_tokens_to_ids(name) for name in ["<|endoftext|>", *special]}


def _whisper_generation(config: Any, ids: dict[str, int]) -> Any:
    generation = hf.GenerationConfig.from_model_config(config)
    allowed = ("<|endoftext|>", "<|notimestamps|>")
    settings = {
        "_from_model_config": False,
        "is_multilingual": True,
        "lang_to_id": {name: ids[name] for name in ("<|en|>", "<|de|>", "<|fr|>")},
        "task_to_id": {name: ids[f"<|{name}|>"] for name in ("translate", "transcribe")},
        "no_timestamps_token_id": ids["<|notimestamps|>"],
        "prev_sot_token_id": ids["<|startofprev|>"],
        "decoder_start_token_id": ids["<|startoftranscript|>"],
        "max_length": 448,
        "max_initial_timestamp_index": 50,
        "return_timestamps": False,
        "alignment_heads": [[1, 0], [1, 1]],
        "suppress_tokens": [number for name, number in ids.items() if name not in allowed],
        "begin_suppress_tokens": [220, ids["<|endoftext|>"]],
    }
    for name, value in settings.items():  # update() ignores what GenerationConfig does not declare
        setattr(generation, name, value)
    return generation


@checkpoint("audio-classification", inputs=inputs.speeches, parameters={"top_k": 3})
def keywords(directory: Path) -> None:
    """Like wav2vec2-base-superb-ks: no attention mask, so padding changes the answer."""
    names = labels("yes", "no", "up", "down", "_silence_")
    config = hf.Wav2Vec2Config(vocab_size=32, feat_extract_norm="group", **_WAV2VEC2, **names)
    model = hf.Wav2Vec2ForSequenceClassification(config)
    save(directory, amplify(model, "classifier", 5.0), _waveforms(masked=False))


@checkpoint("audio-classification:ast", inputs=inputs.speeches, parameters={"top_k": 3})
def spectrogram(directory: Path) -> None:
    """Audio spectrogram transformer: every input has the same size."""
    config = hf.ASTConfig(
        **STACK,
        **NO_DROPOUT,
        **labels("speech", "music", "dog", "rain"),
        patch_size=16,
        frequency_stride=16,
        time_stride=16,
        max_length=128,
        num_mel_bins=32,
    )
    extractor = hf.ASTFeatureExtractor(num_mel_bins=32, max_length=128)
    save(directory, amplify(hf.ASTForAudioClassification(config), "classifier", 3.0), extractor)


@checkpoint(
    "zero-shot-audio-classification",
    inputs=inputs.sounds,
    parameters={"candidate_labels": ["a dog barking", "rain", "a person speaking"]},
)
def clap(directory: Path) -> None:
    tokenizer = roberta_tokenizer()
    text = {
        **NO_DROPOUT,
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": tokenizer.model_max_length + 2,
        "projection_dim": 16,
        "initializer_factor": 10.0,
    }
    extractor = hf.ClapFeatureExtractor(
        feature_size=64,
        sampling_rate=48000,
        hop_length=480,
        max_length_s=10,
        fft_window_size=1024,
        truncation="rand_trunc",
        padding="repeatpad",
        frequency_min=50,
        frequency_max=14000,
    )
    config = hf.ClapConfig(text_config=text, audio_config=_clap_audio(), projection_dim=16)
    save(directory, hf.ClapModel(config), tokenizer, extractor)


def _clap_audio() -> dict[str, Any]:
    return {
        **NO_DROPOUT,
        "spec_size": 256,
        "num_mel_bins": 64,
        "patch_embeds_hidden_size": 8,
        "hidden_size": 32,
        "depths": [1, 1, 1],
        "num_attention_heads": [1, 2, 4],
        "num_hidden_layers": 3,
        "window_size": 4,
        "patch_size": 8,
        "patch_stride": [8, 8],
        "projection_dim": 16,
        "drop_path_rate": 0.0,
        "initializer_factor": 10.0,
    }


@checkpoint("text-to-audio", inputs=inputs.sentences_to_speak)
def vits(directory: Path) -> None:
    """Forward-only speech; the model samples noise inside, so seed torch to repeat an answer."""
    characters = ["_", *" abcdefghijklmnopqrstuvwxyz'-.,!?", "<unk>"]
    tokenizer = from_vocab_file(
        hf.VitsTokenizer,
        _numbered(characters),
        pad_token="_",
        unk_token="<unk>",
        language="eng",
        add_blank=True,
        normalize=True,
        phonemize=False,
        is_uroman=False,
    )
    config = hf.VitsConfig(vocab_size=len(characters), pad_token_id=0, sampling_rate=16000, **_VITS)
    save(directory, hf.VitsModel(config), tokenizer)


_VITS: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "window_size": 2,
    "ffn_dim": 32,
    "flow_size": 16,
    "spectrogram_bins": 9,
    "upsample_initial_channel": 16,
    "upsample_rates": [8, 8],
    "upsample_kernel_sizes": [16, 16],
    "resblock_kernel_sizes": [3],
    "resblock_dilation_sizes": [[1, 3]],
    "duration_predictor_flow_bins": 4,
    "duration_predictor_num_flows": 2,
    "duration_predictor_filter_channels": 16,
    "depth_separable_num_layers": 1,
    "prior_encoder_num_flows": 2,
    "prior_encoder_num_wavenet_layers": 1,
    "posterior_encoder_num_wavenet_layers": 1,
    "layerdrop": 0.0,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "duration_predictor_dropout": 0.0,
}


@checkpoint(
    "text-to-audio:musicgen",
    inputs=inputs.sentences_to_speak,
    parameters={"generate_kwargs": {"max_new_tokens": 12, "do_sample": False}},
)
def musicgen(directory: Path) -> None:
    """Autoregressive text to audio: T5 encoder, MusicGen decoder, EnCodec."""
    tokenizer = t5_tokenizer()
    encoder = hf.T5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0
    )
    config = hf.MusicgenConfig(
        text_encoder=encoder.to_dict(), audio_encoder=_encodec().to_dict(), decoder=_music_decoder().to_dict()
    )
    model = amplify(hf.MusicgenForConditionalGeneration(config), "encoder_attn", 8.0)
    _fill_codebooks(model.audio_encoder)
    model.generation_config.update(
        decoder_start_token_id=16,
        pad_token_id=16,
        bos_token_id=16,
        guidance_scale=3.0,
        do_sample=True,
        max_length=40,
    )
    save(directory, model, tokenizer)


def _fill_codebooks(codec: Any) -> None:
    # They start as zeros, which would turn every code into the same sound.
    for layer in codec.quantizer.layers:
        layer.codebook.embed.normal_()


def _encodec() -> Any:
    # 8000 Hz / (8*4*2) is 125 frames a second of 4 bits a code: 1 kbit/s makes the decoder's two codebooks.
    return hf.EncodecConfig(
        target_bandwidths=[1.0],
        sampling_rate=8000,
        audio_channels=1,
        num_filters=4,
        num_residual_layers=1,
        upsampling_ratios=[8, 4, 2],
        codebook_size=16,
        codebook_dim=8,
        hidden_size=8,
        kernel_size=3,
        last_kernel_size=3,
        residual_kernel_size=3,
        num_lstm_layers=1,
    )


def _music_decoder() -> Any:
    return hf.MusicgenDecoderConfig(
        vocab_size=16,
        max_position_embeddings=256,
        num_hidden_layers=1,
        ffn_dim=32,
        num_attention_heads=2,
        hidden_size=16,
        num_codebooks=2,
        dropout=0.0,
        layerdrop=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        pad_token_id=16,
        bos_token_id=16,
        audio_channels=1,
        initializer_factor=0.2,
    )
