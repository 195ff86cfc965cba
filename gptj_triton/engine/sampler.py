"""Chooses the next token of each sequence from its logits. Knows sequences and their parameters, nothing of the model.

The order is FasterTransformer's: bad words, temperature, penalties, minimum length, top-k, top-p of what top-k kept
(DynamicDecodeLayer.cc, SamplingLayer); min-p, which it does not have, comes last, as in transformers. A row is computed
from that row alone, and its noise from its seed and position alone, so what else is in the batch changes nothing. Top-k
and top-p keep all tokens that tie with the last one kept.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from gptj_triton.engine.runner import Started
from gptj_triton.engine.sequence import Sampled, Sequence

_MASK = (1 << 64) - 1


class HostSampler:
    """Samples in plain torch operations; nothing is launched ahead."""

    steps_ahead = 0

    def can_run_ahead(self, sequences: Iterable[Sequence]) -> bool:
        """Never: the next step waits for the tokens."""
        return False

    def prepare(self, sequences: Iterable[Sequence]) -> None:
        """Nothing is kept from step to step."""

    def start(self, logits: Tensor, sequences: list[Sequence]) -> Started:
        """Sample from float32 `logits` [sequences, V] when the result is waited for."""
        return Started(lambda: [*zip(sequences, sample(logits, sequences), strict=True)], sequences, [])


def sample(logits: Tensor, sequences: list[Sequence]) -> list[list[Sampled]]:
    """Next tokens of each sequence from float32 `logits` [sequences, V], which are overwritten.

    For a beam, its best tokens, best first: enough for all beams to go on even if the end ids are the
    best of each. For any other sequence the one token that was chosen.
    """
    _ban(logits, sequences)
    _scale_by_temperature(logits, sequences)
    _penalise(logits, sequences)
    choices: list[list[Sampled]] = [[] for _ in sequences]
    single = [row for row, sequence in enumerate(sequences) if sequence.params.beam_width == 1]
    if single:
        for row, chosen in zip(single, _choose(logits[single], [sequences[row] for row in single]), strict=True):
            choices[row].append(chosen)
    for row, sequence in enumerate(sequences):
        if sequence.params.beam_width > 1:
            count = min(sequence.params.beam_choices, logits.shape[1])
            best = torch.log_softmax(logits[row], dim=-1).topk(count)
            choices[row] = [Sampled(*pair) for pair in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
    return choices


def _choose(logits: Tensor, sequences: list[Sequence]) -> list[Sampled]:
    """The token of each sequence: the most probable one, or one drawn after top-k, top-p and min-p."""
    tokens = logits.argmax(dim=-1)
    drawn = [row for row, sequence in enumerate(sequences) if not sequence.params.greedy]
    if drawn:
        tokens[drawn] = _draw(logits[drawn], [sequences[row] for row in drawn])
    log_probs = [0.0] * len(sequences)
    asked = [row for row, sequence in enumerate(sequences) if sequence.params.is_return_log_probs]
    if asked:
        chosen = torch.log_softmax(logits[asked], dim=-1).gather(1, tokens[asked][:, None])[:, 0].tolist()
        for row, log_prob in zip(asked, chosen, strict=True):
            log_probs[row] = log_prob
    return [Sampled(token, log_prob) for token, log_prob in zip(tokens.tolist(), log_probs, strict=True)]


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) for one seed and position: splitmix64 (Steele et al., 2014) of one, mixed with the other."""
    return (_splitmix(_splitmix(seed) ^ position) >> 11) * 2.0**-53


def _splitmix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _ban(logits: Tensor, sequences: list[Sequence]) -> None:
    banned = [(row, token) for row, sequence in enumerate(sequences) for token in sequence.banned_tokens()]
    if banned:
        rows, tokens = torch.tensor(banned, device=logits.device).unbind(1)
        logits[rows, tokens] = -torch.inf


def _scale_by_temperature(logits: Tensor, sequences: list[Sequence]) -> None:
    divisors = [sequence.params.divisor for sequence in sequences]
    if any(divisor != 1.0 for divisor in divisors):
        logits /= _column(divisors, logits)


def _penalise(logits: Tensor, sequences: list[Sequence]) -> None:
    """Repetition, presence and frequency penalties over the distinct tokens of prompt and output."""
    for row, sequence in enumerate(sequences):
        params = sequence.params
        if not params.penalised:
            continue
        known = torch.tensor(sequence.tokens(0, sequence.num_tokens), device=logits.device)
        tokens, counts = known.unique(return_counts=True)
        values = logits[row, tokens]
        values = torch.where(values < 0, values * params.repetition_penalty, values / params.repetition_penalty)
        logits[row, tokens] = values - params.presence_penalty - params.frequency_penalty * counts


def _draw(logits: Tensor, sequences: list[Sequence]) -> Tensor:
    """Token ids [sequences], drawn after top-k, top-p and min-p."""
    largest = max(sequence.params.top_k for sequence in sequences)
    if largest:
        _keep_top_k(logits, [sequence.params.top_k for sequence in sequences], largest)
    probs = torch.softmax(logits, dim=-1).nan_to_num_(0.0)  # a row of which every token is banned
    if any(sequence.top_p < 1.0 for sequence in sequences):
        unbounded = any(sequence.top_p < 1.0 and not sequence.params.top_k for sequence in sequences)
        _keep_top_p(probs, [sequence.top_p for sequence in sequences], probs.shape[1] if unbounded else largest)
    if any(sequence.params.min_p > 0.0 for sequence in sequences):
        _keep_min_p(probs, logits, [sequence.params.log_min_p for sequence in sequences])
    cumulative = probs.double().cumsum(dim=-1)
    noise = [uniform(sequence.params.random_seed, sequence.num_tokens) for sequence in sequences]
    targets = _column(noise, cumulative) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, targets, right=True)[:, 0].clamp_(max=logits.shape[1] - 1)


def _keep_top_k(logits: Tensor, top_ks: list[int], largest: int) -> None:
    """Set logits below the k-th largest of a row to -inf; k = 0 keeps all."""
    largest = min(largest, logits.shape[1])
    best = logits.topk(largest, dim=-1).values
    kth = torch.tensor([[min(k, largest) - 1 if k else 0] for k in top_ks], device=logits.device)
    unlimited = torch.tensor([[k == 0] for k in top_ks], device=logits.device)
    logits.masked_fill_((logits < best.gather(1, kth)) & ~unlimited, -torch.inf)


def _keep_top_p(probs: Tensor, top_ps: list[float], candidates: int) -> None:
    """Set probabilities outside the smallest set of mass p to 0; all mass lies in a row's `candidates` largest, or p is
    1.
    """
    best = probs.topk(min(candidates, probs.shape[1]), dim=-1).values
    wanted = _column(top_ps, best)
    before = best.double().cumsum(dim=-1) - best
    last = ((before < wanted).sum(dim=-1, keepdim=True) - 1).clamp_(min=0)
    threshold = best.gather(1, last)
    probs.masked_fill_((probs < threshold) & (wanted < 1.0), 0.0)


def _keep_min_p(probs: Tensor, logits: Tensor, log_min_ps: list[float]) -> None:
    """Set probabilities to 0 where the logit is lower than the row's best one by more than -log(min_p)."""
    probs.masked_fill_(logits < logits.amax(dim=-1, keepdim=True) + _column(log_min_ps, logits), 0.0)


def _column(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]
