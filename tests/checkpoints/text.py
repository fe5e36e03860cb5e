"""Text checkpoints: BERT encoders, TAPAS, a Llama decoder and a T5 encoder-decoder."""

from pathlib import Path
from typing import Any

import transformers as hf

from tests.checkpoints import inputs
from tests.checkpoints.parts import STACK, amplify, bert_sizes, labels, save, set_bias, token_ids
from tests.checkpoints.registry import checkpoint
from tests.checkpoints.vocabularies import (
    bert_tokenizer,
    byte_bpe,
    chat_tokenizer,
    from_vocab_file,
    t5_tokenizer,
    wordpiece,
)

TRUNCATE = {"truncation": True}
ENTAILMENT = {"candidate_labels": inputs.LABELS}
GREEDY_SEARCH = {**inputs.GREEDY, "num_beams": 1}


@checkpoint("text-classification", inputs=inputs.texts, parameters=TRUNCATE)
def sentiment(directory: Path) -> None:
    tokenizer = bert_tokenizer()
    config = hf.BertConfig(**bert_sizes(tokenizer), **labels("NEGATIVE", "NEUTRAL", "POSITIVE"))
    save(directory, amplify(hf.BertForSequenceClassification(config), "classifier", 3.0), tokenizer)


@checkpoint("feature-extraction", inputs=inputs.texts, parameters=TRUNCATE)
def embeddings(directory: Path) -> None:
    tokenizer = bert_tokenizer()
    save(directory, hf.BertModel(hf.BertConfig(**bert_sizes(tokenizer))), tokenizer)


@checkpoint("fill-mask", inputs=inputs.masked_texts, parameters={"top_k": 3, "tokenizer_kwargs": dict(TRUNCATE)})
def masked(directory: Path) -> None:
    tokenizer = bert_tokenizer()
    save(directory, hf.BertForMaskedLM(hf.BertConfig(**bert_sizes(tokenizer))), tokenizer)


@checkpoint("token-classification", inputs=inputs.texts, parameters={"aggregation_strategy": "simple", "stride": 8})
def entities(directory: Path) -> None:
    """A context of 64 tokens, so that long texts become several chunks."""
    tokenizer = bert_tokenizer(64)
    config = hf.BertConfig(**bert_sizes(tokenizer), **labels("O", "B-PER", "I-PER", "B-LOC", "I-LOC"))
    save(directory, amplify(hf.BertForTokenClassification(config), "classifier", 4.0), tokenizer)


@checkpoint("zero-shot-classification", inputs=inputs.texts, parameters=ENTAILMENT)
def entailment(directory: Path) -> None:
    tokenizer = bert_tokenizer()
    config = hf.BertConfig(**bert_sizes(tokenizer), **labels("contradiction", "neutral", "entailment"))
    save(directory, amplify(hf.BertForSequenceClassification(config), "classifier", 3.0), tokenizer)


@checkpoint("question-answering", inputs=inputs.questions)
def spans(directory: Path) -> None:
    tokenizer = bert_tokenizer()
    model = hf.BertForQuestionAnswering(hf.BertConfig(**bert_sizes(tokenizer)))
    save(directory, amplify(model, "qa_outputs", 3.0), tokenizer)


@checkpoint("table-question-answering", inputs=inputs.table_questions)
def tables(directory: Path) -> None:
    """TAPAS: two heads, hence nested outputs; its tokenizer is a slow one."""
    vocab = wordpiece()
    vocab["[EMPTY]"] = len(vocab)
    tokenizer = from_vocab_file(hf.TapasTokenizer, vocab, model_max_length=256)
    config = hf.TapasConfig(
        **bert_sizes(tokenizer),
        type_vocab_sizes=[3, 64, 64, 2, 64, 64, 10],
        num_aggregation_labels=4,
        aggregation_labels={0: "NONE", 1: "SUM", 2: "AVERAGE", 3: "COUNT"},
        no_aggregation_label_index=0,
    )
    model = amplify(hf.TapasForQuestionAnswering(config), "aggregation_classifier", 3.0)
    set_bias(model.aggregation_classifier.bias, [1.8, 1.0, 1.0, -2.0])
    set_bias(model.output_bias, 0.5)
    save(directory, model, tokenizer)


@checkpoint("text-generation", inputs=inputs.prompts, parameters=inputs.GREEDY)
@checkpoint("decision", inputs=inputs.decisions)
def chat(directory: Path) -> None:
    tokenizer = chat_tokenizer()
    save(directory, hf.LlamaForCausalLM(llama_config(tokenizer)), tokenizer)


def llama_config(tokenizer: Any) -> Any:
    """A two-layer Llama of 512 positions that fits `tokenizer`; the language half of LLaVA too."""
    return hf.LlamaConfig(
        **STACK,
        **token_ids(tokenizer),
        vocab_size=len(tokenizer),
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )


_GERMAN = inputs.sources("translate English to German: ")


@checkpoint(
    "summarization",
    inputs=inputs.sources("summarize: "),
    parameters={**inputs.GREEDY, "num_beams": 2},
)
@checkpoint("translation", inputs=_GERMAN, parameters=GREEDY_SEARCH)
@checkpoint("translation_xx_to_yy", inputs=_GERMAN, parameters=GREEDY_SEARCH)
@checkpoint("text2text-generation", inputs=inputs.sources(""), parameters=GREEDY_SEARCH)
def sequence_to_sequence(directory: Path) -> None:
    tokenizer = t5_tokenizer()
    german = {"prefix": "translate English to German: ", "max_length": 40, "num_beams": 2}
    summary = {"prefix": "summarize: ", "max_length": 40, "min_length": 4, "num_beams": 2}
    config = hf.T5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=tokenizer.pad_token_id,
        **token_ids(tokenizer, "pad", "eos"),
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    config.task_specific_params = {"summarization": summary, "translation_en_to_de": german}
    save(directory, amplify(hf.T5ForConditionalGeneration(config), "EncDecAttention", 4.0), tokenizer)


@checkpoint("summarization:bart", inputs=inputs.sources(""), parameters={**inputs.GREEDY, "num_beams": 2})
def denoiser(directory: Path) -> None:
    """BART: learnt positions, a decoder that begins with the end token, and a last token that is forced."""
    vocab, merges = byte_bpe(420, ["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    tokenizer = hf.RobertaTokenizer(vocab=vocab, merges=merges, model_max_length=128)
    config = hf.BartConfig(
        **_encoder_decoder(tokenizer),
        max_position_embeddings=128,
        decoder_start_token_id=tokenizer.eos_token_id,
        forced_bos_token_id=tokenizer.bos_token_id,
        forced_eos_token_id=tokenizer.eos_token_id,
    )
    save(directory, amplify(hf.BartForConditionalGeneration(config), "encoder_attn", 4.0), tokenizer)


@checkpoint(
    "translation:nllb",
    inputs=inputs.sources(""),
    parameters={**GREEDY_SEARCH, "src_lang": "eng_Latn", "tgt_lang": "fra_Latn"},
)
def many_languages(directory: Path) -> None:
    """NLLB: the language of a text stands in front of it, that of its translation is forced on the decoder."""
    vocab, merges = byte_bpe(420, ["<s>", "<pad>", "</s>", "<unk>"])
    languages = ["eng_Latn", "fra_Latn", "deu_Latn"]
    tokenizer = hf.NllbTokenizer(
        vocab=vocab, merges=merges, extra_special_tokens=languages, src_lang="eng_Latn", model_max_length=256
    )
    config = hf.M2M100Config(
        **_encoder_decoder(tokenizer),
        max_position_embeddings=256,
        decoder_start_token_id=tokenizer.eos_token_id,
        encoder_layerdrop=0.0,
        decoder_layerdrop=0.0,
    )
    save(directory, amplify(hf.M2M100ForConditionalGeneration(config), "encoder_attn", 4.0), tokenizer)


def _encoder_decoder(tokenizer: Any) -> dict[str, Any]:
    """Sizes of a BART-like model that fits `tokenizer`."""
    layers = {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in _LAYERS.items()}
    return {
        **layers,
        **token_ids(tokenizer),
        "vocab_size": len(tokenizer),
        "d_model": 32,
        "dropout": 0.0,
        "init_std": 0.2,
    }


_LAYERS = {"layers": 2, "attention_heads": 4, "ffn_dim": 64}
