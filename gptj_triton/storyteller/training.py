"""Trains a GPT-J: batches, optimisers, the loop that keeps the best averaged weights. Knows neither text nor files."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from types import MethodType

import torch
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm
from transformers import GPTJForCausalLM
from transformers.models.gptj.modeling_gptj import GPTJAttention

from gptj_triton.storyteller.curve import Curve
from gptj_triton.storyteller.settings import Settings


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
