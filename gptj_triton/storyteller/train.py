"""Train `storyteller`, the small GPT-J this repository ships, from one plain-text corpus of fairy tales.

    python tools/train_storyteller.py --corpus fairy_tales.txt --out model_repository/fastertransformer/1/storyteller

It trains a byte-level BPE and a `transformers` GPTJForCausalLM, holds out a tenth of the text, keeps the weights with
the lowest held-out loss and writes a Hugging Face directory with its model card. A GPU is used when there is one; on a
CPU the same command ends overnight, because the schedule shrinks to `--hours`. It knows nothing of Triton or of the
engine. The corpus: one paragraph a line, an empty line between books.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm
from transformers import GenerationConfig, GPTJConfig, GPTJForCausalLM, PreTrainedTokenizerFast
from transformers.models.gptj.modeling_gptj import GPTJAttention
from transformers.utils.logging import disable_progress_bar

from gptj_triton.storyteller.card import Curve, Figures, hardware_name, plot_losses, write_card

END_OF_TEXT = "<|endoftext|>"
# The corpus does not mark where a tale ends, but most tales open with one of these.
TALE_OPENING = re.compile(
    r"Once (up)?on a time|There (was|were) once|There once (was|were|lived)|Once there (was|were|lived)"
    r"|(A long time|Long, long|Many years) ago"
)


def option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Settings:
    """One training run; every field is an option of the command line."""

    corpus: Path = field(metadata={"help": "UTF-8 text, one paragraph a line, an empty line between books"})
    out: Path = field(metadata={"help": "directory to write the checkpoint to"})
    device: str = option("auto", "auto, cpu or cuda")
    seed: int = option(0, "seed of the held-out choice, the initial weights and the order of the data")
    vocab_size: int = option(4096, "entries of the tokenizer, <|endoftext|> included")
    context: int = option(1024, "tokens of context (n_positions)")
    width: int = option(256, "n_embd")
    layers: int = option(6, "n_layer")
    heads: int = option(4, "n_head")
    rotary_dim: int = option(32, "rotated features of each head")
    dropout: float = option(0.1, "dropout of embeddings, attention and residuals")
    optimizer: str = option("muon", "optimiser of the blocks' matrices, muon or adamw; all else is AdamW's")
    learning_rate: float = option(1e-2, "peak learning rate")
    weight_decay: float = option(1.0, "decoupled weight decay of all matrices")
    ema_decay: float = option(0.99, "decay a step of the averaged weights, which are the ones kept")
    batch_size: int = option(16, "windows of context tokens in a step")
    epochs: int = option(20, "most passes over the training text")
    steps: int = option(0, "most optimiser steps (0: no limit)")
    hours: float = option(9.0, "most hours of training; a slow machine gets a shorter schedule")
    patience: int = option(4, "evaluations (one an epoch) without a lower held-out loss before it stops")


def parse_settings(argv: Sequence[str] | None) -> Settings:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    for item in fields(Settings):
        flag = "--" + item.name.replace("_", "-")
        if item.default is MISSING:
            parser.add_argument(flag, type=Path, required=True, help=item.metadata["help"])
        else:
            text = f"{item.metadata['help']} (default: %(default)s)"
            parser.add_argument(flag, type=type(item.default), default=item.default, help=text)
    return Settings(**vars(parser.parse_args(argv)))


def resolve_device(name: str) -> str:
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def read_corpus(path: Path) -> list[str]:
    """The corpus as paragraphs, each with what follows it: a newline, or END_OF_TEXT where a tale or a book ends.

    Raises SystemExit with one line when the file is missing, empty or not UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SystemExit(f"cannot read the corpus {path}: {error}") from None
    if not text:
        raise SystemExit(f"the corpus {path} is empty")
    lines = text.split("\n")
    followers = [*lines[1:], ""]
    ends = (not after or TALE_OPENING.match(after) for after in followers)
    return [line + (END_OF_TEXT if end else "\n") for line, end in zip(lines, ends, strict=True) if line]


def hold_out(paragraphs: list[str], seed: int) -> tuple[list[str], list[str]]:
    """Split into training and held-out paragraphs: of every ten consecutive blocks of about 8,000 characters, one is
    held out, drawn by `seed`; so each book gives a tenth, in runs long enough to be read as text."""
    block_size = min(8000, sum(map(len, paragraphs)) // 50)
    blocks: list[list[str]] = [[]]
    size = 0
    for paragraph in paragraphs:
        blocks[-1].append(paragraph)
        size += len(paragraph)
        if size >= block_size:
            blocks.append([])
            size = 0
    draw = random.Random(seed)
    training: list[str] = []
    held_out: list[str] = []
    for start in range(0, len(blocks), 10):
        chosen = start + draw.randrange(10)
        for index in range(start, min(start + 10, len(blocks))):
            (held_out if index == chosen else training).extend(blocks[index])
    return training, held_out


def train_tokenizer(paragraphs: list[str], vocab_size: int, context: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE without a prefix space; all 256 bytes are in it, so any text round-trips.

    END_OF_TEXT is the last id.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator((text.replace(END_OF_TEXT, "\n") for text in paragraphs), trainer)
    tokenizer.add_special_tokens([END_OF_TEXT])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, paragraphs: list[str]) -> torch.Tensor:
    """The paragraphs as one stream of token ids, int64 [tokens]."""
    encodings = tokenizer.backend_tokenizer.encode_batch(paragraphs)
    return torch.tensor([token for encoding in encodings for token in encoding.ids])


def cut_windows(stream: torch.Tensor, length: int, offset: int = 0) -> torch.Tensor:
    """Windows [n, length + 1] that overlap by one token, so that each token after the first is predicted once."""
    return stream[offset:].unfold(0, length + 1, length)


def training_batches(stream: torch.Tensor, settings: Settings, draw: torch.Generator) -> Iterator[torch.Tensor]:
    """Batches [batch, context + 1] for ever; each epoch shifts the windows, so that few windows are ever seen twice."""
    while True:
        offset = int(torch.randint(min(settings.context, len(stream) - settings.context), (), generator=draw))
        windows = cut_windows(stream, settings.context, offset)
        order = torch.randperm(len(windows), generator=draw)
        yield from (
            windows[chosen] for chosen in order.split(settings.batch_size) if len(chosen) == settings.batch_size
        )


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


def new_optimizers(model: GPTJForCausalLM, settings: Settings) -> list[torch.optim.Optimizer]:
    """Muon or AdamW for the blocks' matrices, AdamW for embeddings and output; biases and norms are not decayed."""
    named = list(model.named_parameters())
    blocks = [weight for name, weight in named if weight.ndim == 2 and name.startswith("transformer.h.")]
    tables = [weight for name, weight in named if weight.ndim == 2 and not name.startswith("transformer.h.")]
    vectors = [weight for _, weight in named if weight.ndim < 2]
    groups = [
        {"params": tables, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    rate = settings.learning_rate
    if settings.optimizer == "adamw":
        groups.append({"params": blocks, "weight_decay": settings.weight_decay})
        return [torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))]
    muon = torch.optim.Muon(blocks, lr=rate, weight_decay=settings.weight_decay, adjust_lr_fn="match_rms_adamw")
    return [torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98)), muon]


def use_fused_attention(model: GPTJForCausalLM) -> None:
    """Let PyTorch's fused kernel compute the attention of unpadded windows; GPT-J's own code, which stores every score,
    makes a training step several times slower. The saved model is measured without this."""

    def attend(
        self: GPTJAttention,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, None]:
        dropout = self.attn_dropout.p if self.training else 0.0
        return scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True), None

    for block in model.transformer.h:
        block.attn._attn = MethodType(attend, block.attn)


def token_losses(model: torch.nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy in nats a token of windows int64 [batch, length + 1]; bfloat16 where the GPU has it."""
    with torch.autocast(windows.device.type, torch.bfloat16, enabled=windows.is_cuda):
        logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: torch.nn.Module, windows: torch.Tensor, batch_size: int, device: torch.device) -> float:
    """Loss in nats a token over windows [n, length + 1], without dropout."""
    model.eval()
    batches = windows.split(batch_size)
    return sum(token_losses(model, batch.to(device)).item() * len(batch) for batch in batches) / len(windows)


def rate_factor(progress: float) -> float:
    """Share of the peak learning rate at `progress` (0 to 1) of the schedule: short warm-up, then linear to zero."""
    return min(progress / 0.02, (1.0 - progress) / 0.98) if progress < 1.0 else 0.0


def fit(
    model: GPTJForCausalLM, stream: torch.Tensor, held_out: torch.Tensor, settings: Settings, device: torch.device
) -> Curve:
    """Train `model` in place on `stream` int64 [tokens] and leave in it the averaged weights with the lowest loss on
    `held_out` [n, context + 1]. The schedule ends after `epochs`, `steps` or `hours`, whichever is first."""
    model.to(device)
    use_fused_attention(model)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(settings.ema_decay))
    optimizers = new_optimizers(model, settings)
    draw = torch.Generator().manual_seed(settings.seed)
    steps_an_epoch = max(1, (len(stream) - 1) // settings.context // settings.batch_size)
    total = min(settings.steps or math.inf, settings.epochs * steps_an_epoch)
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    curve = Curve(steps_an_epoch)
    best = copy.deepcopy(average.module.state_dict())
    recent: list[torch.Tensor] = []
    start = time.monotonic()
    bar = tqdm(training_batches(stream, settings, draw), total=int(total), unit="step", desc="training", mininterval=1)
    for step, windows in enumerate(bar, start=1):
        progress = max(step / total, (time.monotonic() - start) / 3600 / settings.hours)
        for optimizer, rates in zip(optimizers, peaks, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * rate_factor(progress)
        model.train()
        loss = token_losses(model, windows.to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        average.update_parameters(model)
        recent.append(loss.detach())
        if step % steps_an_epoch and progress < 1.0:
            continue
        curve.add(step, torch.stack(recent).mean().item(), evaluate(average, held_out, settings.batch_size, device))
        recent.clear()
        bar.set_postfix(train=f"{curve.training[-1]:.3f}", held_out=f"{curve.held_out[-1]:.3f}")
        if curve.since_best == 0:
            best = copy.deepcopy(average.module.state_dict())
        if curve.since_best >= settings.patience or progress >= 1.0:
            break
    bar.close()
    curve.seconds = time.monotonic() - start
    model.load_state_dict(best)
    return curve


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
    settings = parse_settings(argv)
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
