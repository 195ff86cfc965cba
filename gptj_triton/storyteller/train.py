"""Train `storyteller`, the small GPT-J this repository ships, from one plain-text corpus of fairy tales.

    python tools/train_storyteller.py --corpus fairy_tales.txt --out model_repository/fastertransformer/1/storyteller

It trains a byte-level BPE and a `transformers` GPTJForCausalLM, holds out a tenth of the text, keeps the weights with
the lowest held-out loss and writes a Hugging Face directory with its model card. A GPU is used when there is one; on a
CPU the same command ends overnight, because the schedule shrinks to `--hours`. It knows nothing of Triton or of the
engine. The corpus: one paragraph a line, an empty line between books.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import GenerationConfig, GPTJConfig, GPTJForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from gptj_triton.storyteller.card import Figures, hardware_name, write_card
from gptj_triton.storyteller.corpus import END_OF_TEXT, encode, hold_out, read_corpus, train_tokenizer
from gptj_triton.storyteller.curve import plot_losses
from gptj_triton.storyteller.settings import Settings, parse_settings
from gptj_triton.storyteller.training import cut_windows, evaluate, fit


def resolve_device(name: str) -> str:
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def new_model(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> GPTJForCausalLM:
    config = GPTJConfig(
        vocab_size=len(tokenizer),
        n_positions=settings.context,
        n_embd=settings.width,
        n_layer=settings.layers,
        n_head=settings.heads,
        rotary_dim=settings.rotary_dim,
        embd_pdrop=settings.dropout,
        attn_pdrop=settings.dropout,
        resid_pdrop=settings.dropout,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    return GPTJForCausalLM(config)


def save(out: Path, model: GPTJForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write weights (fp16), configs and tokenizer to `out`, in Hugging Face's layout."""
    model.half().save_pretrained(out)
    end = tokenizer.eos_token_id
    GenerationConfig(bos_token_id=end, eos_token_id=end, pad_token_id=end).save_pretrained(out)
    tokenizer.save_pretrained(out)
    # transformers 5 writes a class name of its own, which version 4 does not know; both know this one.
    path = out / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    config.pop("backend", None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Train, save, load what was saved, measure it and write the card. Raises SystemExit with one line on bad input."""
    settings = parse_settings(argv, str(__doc__).splitlines()[0])
    if settings.context < 128:
        raise SystemExit(f"--context {settings.context}: at least 128, so that the card's prompts and samples fit")
    disable_progress_bar()
    device = torch.device(resolve_device(settings.device))
    torch.manual_seed(settings.seed)
    training, held_out = hold_out(read_corpus(settings.corpus), settings.seed)
    tokenizer = train_tokenizer(training, settings.vocab_size, settings.context)
    train_stream, held_stream = encode(tokenizer, training), encode(tokenizer, held_out)
    if min(len(train_stream), len(held_stream)) <= settings.context:
        raise SystemExit(
            f"the corpus {settings.corpus} is too short: its held-out tenth has {len(held_stream)} tokens, "
            f"and a context of {settings.context} needs more than that many"
        )
    held_windows = cut_windows(held_stream, settings.context)
    model = new_model(settings, tokenizer)
    curve = fit(model, train_stream, held_windows, settings, device)

    save(settings.out, model, tokenizer)
    plot_losses(curve, settings.out / "loss.png")

    saved = GPTJForCausalLM.from_pretrained(settings.out, dtype=torch.float32).to(device)
    train_windows = cut_windows(train_stream, settings.context)
    figures = Figures(
        settings=settings,
        curve=curve,
        hardware=hardware_name(device),
        text_bytes=settings.corpus.stat().st_size,
        held_out_bytes=sum(len(text.replace(END_OF_TEXT, "\n").encode()) for text in held_out),
        training_tokens=len(train_stream),
        held_out_tokens=len(held_stream),
        training_loss=evaluate(saved, train_windows, settings.batch_size, device),
        held_out_loss=evaluate(saved, held_windows, settings.batch_size, device),
    )
    write_card(settings.out, saved.cpu().eval(), tokenizer, figures)
    print(f"{settings.out}: training loss {figures.training_loss:.4f}, held-out loss {figures.held_out_loss:.4f}")
    return 0
