"""What one response, or one choice, is worth. Pure functions of texts, token ids and log-likelihoods."""

from __future__ import annotations

from collections.abc import Sequence

MIN_REPEATS = 4
MIN_REPEATED_TOKENS = 8


def answer_of(response: str) -> str:
    """What a response answers: the text behind its last "Answer:" up to the end of the line, else its last line."""
    lines = response.strip().splitlines() or [""]
    _, marker, answer = response.rpartition("Answer:")
    return (answer.strip().splitlines() or [""])[0].strip() if marker else lines[-1].strip()


def ends_in_repetition(response: Sequence[int], *, end_tokens: Sequence[int] = ()) -> bool:
    """Whether a response ends in one phrase, of any length, MIN_REPEATS times in a row and over MIN_REPEATED_TOKENS tokens or more.

    An end token behind it is left out. That a repeated phrase at the very end is what to look for is from Holtzman et al., The
    Curious Case of Neural Text Degeneration (arXiv 1904.09751); the limits are ours: four zeros of a number are no loop.
    """
    tokens = list(response)
    while tokens and tokens[-1] in end_tokens:
        tokens.pop()
    for length in range(1, len(tokens) // MIN_REPEATS + 1):
        repeats = max(MIN_REPEATS, -(-MIN_REPEATED_TOKENS // length))
        if len(tokens) >= repeats * length:
            tail = tokens[-repeats * length :]
            if tail == tail[-length:] * repeats:
                return True
    return False


def best_choice(log_likelihoods: Sequence[float], texts: Sequence[str] | None = None) -> int:
    """Index of the likeliest choice; with `texts`, of the likeliest a character. The first of equals.

    These are `acc` and `acc_norm` of lm-evaluation-harness 0.4 (lm_eval/api/task.py, ConfigurableTask.process_results), which
    divides the sum of log-likelihoods by the number of characters of the choice, not of its tokens or bytes.
    """
    lengths = [1] * len(log_likelihoods) if texts is None else [max(1, len(text)) for text in texts]
    values = [likelihood / length for likelihood, length in zip(log_likelihoods, lengths, strict=True)]
    return values.index(max(values))
