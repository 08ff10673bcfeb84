"""`calibrate_model`: which selection changes a model's answers least, on a user's own prompts and without labels."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from script_kernels.calibrate import Calibration, Candidate, calibrate, candidates

from .families import ALONG, family_of, token_id, unwrap
from .layouts import MODALITIES
from .prune import has_pixels, prune_inputs
from .query import text_query
from .select import explicit

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def calibrate_model(
    model: PreTrainedModel,
    inputs: Sequence[Mapping[str, Any]],
    *,
    keep: int,
    first_tokens: int = 4,
    tokenizer: Any = None,
    budget: int | None = None,
    grid: Sequence[Candidate] | None = None,
    path: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
    **arguments: Any,
) -> Calibration:
    """Compares next-token distributions, pruned and unpruned, along the unpruned model's own first tokens.

    For each input the model answers once unpruned; then, for each candidate, one prefill of the pruned prompt with that
    answer behind it gives the distributions of the same tokens. The images are encoded anew each time.

    Args:
        model: as `prune_inputs` takes it.
        inputs: what its processor returns for one prompt with its images each, without padding; some dozen.
        keep: tokens that stay of each unit.
        first_tokens: how many of the answer's tokens are compared.
        tokenizer: as in `prune_inputs`.
        budget, grid, path, progress: as in `script_kernels.calibrate.calibrate`.
        arguments: `per`, `positions`, `min_tokens` and `newlines` of `prune_inputs`.

    Returns:
        A `Calibration`, which `prune_inputs(..., calibration=)` takes, as it does the file that it is saved in.

    Raises:
        ValueError: an input without pixels, of several prompts or with padding; `first_tokens` below 1; and what
            `calibrate` and `prune_inputs` raise.
    """
    model = unwrap(model)
    family_of(model)
    if isinstance(first_tokens, bool) or not isinstance(first_tokens, int) or first_tokens < 1:
        raise ValueError(f"first_tokens: expected an int of at least 1, got {first_tokens!r}")
    for n, given in enumerate(inputs):
        _check(model, given, n)
    compared = _Comparison(model, keep, first_tokens, tokenizer, arguments)
    return calibrate(compared, inputs, keep=keep, budget=budget, grid=grid, path=path, progress=progress)


def calibrate_folder(
    model_path: str,
    images: pathlib.Path,
    questions: pathlib.Path,
    *,
    keep: int,
    budget: int | None = None,
    grid: Sequence[Candidate] | None = None,
    **options: Any,
) -> Calibration:
    """`calibrate_model` on pictures in a folder, with a line of `questions` for each: file name, tab, question.

    budget: None: 16 times the candidates. options: as `calibrate_model` takes them.

    Raises:
        ValueError: a line of another form, no line at all, a picture that is not there; OSError: no such model or file.
    """
    asked = read_questions(images, questions)
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(model_path)
    model = AutoModelForImageTextToText.from_pretrained(model_path, dtype="auto").eval()
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    inputs = []
    for path, question in asked:
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
        content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
        made = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )
        inputs.append(made.to(model.device, model.dtype))
    grid = candidates() if grid is None else grid
    budget = 16 * len(grid) if budget is None else budget
    return calibrate_model(model, inputs, keep=keep, tokenizer=processor, budget=budget, grid=grid, **options)


def read_questions(images: pathlib.Path, questions: pathlib.Path) -> list[tuple[pathlib.Path, str]]:
    """Pictures and questions; blank lines count for nothing."""
    asked = []
    for n, line in enumerate(questions.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        name, tab, question = line.partition("\t")
        if not (name.strip() and tab and question.strip()):
            raise ValueError(f"{questions}:{n}: expected a file name, a tab and a question, got {line[:80]!r}")
        path = images / name.strip()
        if not path.is_file():
            raise ValueError(f"{questions}:{n}: expected a picture in {images}, got {name.strip()!r}")
        asked.append((path, question.strip()))
    if not asked:
        raise ValueError(f"{questions}: expected lines of a file name, a tab and a question, got none")
    return asked


class _Comparison:
    """What `calibrate` runs. It remembers the input that was answered last, whose candidates come next."""

    def __init__(
        self, model: PreTrainedModel, keep: int, first_tokens: int, tokenizer: Any, arguments: dict[str, Any]
    ) -> None:
        self.model, self.keep, self.first_tokens, self.tokenizer = model, keep, first_tokens, tokenizer
        self.arguments = arguments
        self.given: Mapping[str, Any] | None = None

    @torch.no_grad()
    def __call__(self, given: Mapping[str, Any], candidate: Candidate | None) -> Tensor:
        if candidate is None:
            return self._answer(given)
        assert self.given is given
        pruned = prune_inputs(
            self.model,
            self.prompt,
            self.keep,
            query=self.query if candidate.query else None,
            method=candidate.method,
            reduce=candidate.reduce,
            **self.arguments,
            **explicit(candidate),
        )
        if pruned.stats.visual_after == pruned.stats.visual_before:
            raise ValueError(
                f"keep: expected fewer than the {pruned.stats.visual_before[0]} visual tokens of an input, "
                f"got {self.keep}, which prunes nothing"
            )
        logits = self.model(**pruned, use_cache=False).logits
        return logits[0, -self.answered :].float().log_softmax(-1).cpu()

    def _answer(self, given: Mapping[str, Any]) -> Tensor:
        """Has the unpruned model answer, and keeps the prompt with all but the answer's last token behind it."""
        ids = given["input_ids"]
        out = self.model.generate(
            **given,
            max_new_tokens=self.first_tokens,
            do_sample=False,
            num_beams=1,
            return_dict_in_generate=True,
            output_logits=True,
        )
        logits = torch.stack(out.logits, 1)[0]
        self.answered = len(logits)
        said = out.sequences[:, -self.answered :][:, :-1].to(ids.device)
        longer = {"input_ids": torch.cat([ids, said], 1)}
        for key in ("attention_mask", *ALONG):
            if given.get(key) is not None:  # what is said is text, as the prompt's last token is
                last = given[key][:, -1:].expand(-1, said.shape[1])
                longer[key] = torch.cat([given[key], last], 1)
        self.given, self.prompt = given, {**given, **longer}
        visual = {i for i in (token_id(self.model, modality) for modality in MODALITIES) if i is not None}
        # Of the prompt alone: what the model said is no word of the user's.
        self.query = text_query(self.model, ids[0].cpu(), visual, mean=False, tokenizer=self.tokenizer)
        return logits.float().log_softmax(-1).cpu()


def _check(model: PreTrainedModel, given: Mapping[str, Any], n: int) -> None:
    ids, mask = given.get("input_ids"), given.get("attention_mask")
    if not isinstance(ids, Tensor) or ids.ndim != 2 or len(ids) != 1:
        raise ValueError(f"inputs[{n}]: expected input_ids of shape (1, S), got {getattr(ids, 'shape', None)}")
    if not has_pixels(model, given):
        raise ValueError(f"inputs[{n}]: expected an image or a video, got text alone")
    if mask is not None and not bool((mask != 0).all()):
        raise ValueError(f"inputs[{n}]: expected a prompt without padding, got {int((mask == 0).sum())} masked tokens")
