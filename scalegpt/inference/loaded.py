"""A loaded model, with methods that continue prompts and score texts."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from scalegpt.checkpoint.manifest import Header
from scalegpt.config import DataConfig
from scalegpt.config.inference import EvaluationSettings
from scalegpt.config.run import READING
from scalegpt.config.sampling import SamplingSettings
from scalegpt.data.prepare import split_inputs
from scalegpt.data.prepared import prepared_at
from scalegpt.data.sidecar import SPLITS
from scalegpt.data.tokenizers import Tokenizer
from scalegpt.errors import InputError, nearest
from scalegpt.inference.continuations import Part, Request, continue_prompts
from scalegpt.inference.evaluation import Evaluation, Progress, evaluate, mean_of, part_of
from scalegpt.inference.texts import Text, text_of_files, text_of_split, tokens_of_folder, tokens_of_run
from scalegpt.inputs import MIXTURE_BLOCK, Inputs, as_text, shares_of, sources_of
from scalegpt.model.gpt import GPT
from scalegpt.text import one_line, shown

DEFAULTS = SamplingSettings()


class LoadedModel(NamedTuple):
    """A trained model in evaluation mode, its tokenizer, and the header of the checkpoint that it came from."""

    model: GPT
    tokenizer: Tokenizer
    header: Header

    def generate(
        self,
        prompt: str = "",
        *,
        max_new_tokens: int = DEFAULTS.max_new_tokens,
        temperature: float = DEFAULTS.temperature,
        top_k: int | None = DEFAULTS.top_k,
        top_p: float | None = DEFAULTS.top_p,
        seed: int = DEFAULTS.seed,
        stop: str | Sequence[str] = (),
    ) -> str:
        """Continue a text.

        Args:
            prompt: the text; the model reads its last ``block_size`` tokens. Empty: a new text.
            max_new_tokens: most tokens to draw; fewer are drawn if the model ends the text.
            temperature: divides the logits; 0 always takes the likeliest token.
            top_k: draw among the k likeliest tokens; None: among all.
            top_p: draw among the fewest likeliest tokens whose probabilities reach p together; None: among all.
            seed: the same seed gives the same text.
            stop: a text or several; the continuation ends before the first of them that appears in it.

        Returns:
            The continuation, without the prompt.

        Raises:
            InputError: a value outside its bounds, or a prompt with a character that the vocabulary lacks.
            RunError: the model diverged in training: its logits are not finite.
        """
        given = {
            "max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed,
        }  # fmt: skip
        settings = SamplingSettings.from_mapping(given, "generate()")
        return "".join(part.text for part in self.stream([prompt], settings, stop=stop))

    def stream(
        self,
        prompts: Sequence[str],
        settings: SamplingSettings,
        *,
        num_samples: int = 1,
        stop: str | Sequence[str] = (),
        micro_batch: int = 8,
    ) -> Iterator[Part]:
        """Continue texts, each ``num_samples`` times, and yield the new text as it is drawn.

        Args:
            prompts: the texts; the model reads the last ``block_size`` tokens of each. Empty: a new text.
            settings: how many tokens to draw, and how. Sample i of every prompt is drawn with ``settings.seed`` + i.
            num_samples: continuations of each prompt.
            stop: a text or several; a continuation ends before the first of them that appears in it.
            micro_batch: the most continuations computed at once. Only prompts with equal numbers of tokens are computed
                together.

        Yields:
            Parts of continuations. Continuation ``index`` is sample ``index % num_samples`` of prompt
            ``index // num_samples``. Parts of several continuations alternate.

        Raises:
            InputError: a stop text is empty, or a prompt has a character that the vocabulary lacks.
            RunError: the model diverged in training: its logits are not finite.
        """
        ends = (stop,) if isinstance(stop, str) else tuple(stop)
        if "" in ends:
            raise InputError("stop must not be empty")
        ids_of_each = self.all_prompt_ids(prompts)
        requests = [Request(ids, settings.seed + sample) for ids in ids_of_each for sample in range(num_samples)]
        yield from continue_prompts(self.model, self.tokenizer, requests, settings, stop=ends, micro_batch=micro_batch)

    def evaluate(
        self,
        input_file: Inputs | None = None,
        *,
        split: str | None = None,
        stride: int | None = None,
        micro_batch: int = 8,
        progress: Progress | None = None,
        **reading: Any,
    ) -> Evaluation:
        """Score how well the model predicts a text, or a split of prepared tokens.

        Args:
            input_file: a text file, a folder of text, a list of these, or a folder of prepared tokens; several with weights,
                such as ``{"a.txt": 0.7, "b.txt": 0.3}``; None: the tokens that the run was trained on.
            split: ``train`` or ``val`` of prepared tokens; None: ``val``. Only for prepared tokens.
            stride: tokens between the starts of two windows, from 1 to ``block_size``; None: ``block_size``. A smaller
                stride gives tokens more context, and takes longer.
            micro_batch: windows computed at once.
            progress: called with the share of the text that has been read, and the number of tokens scored.
            reading: how text is read: the settings :data:`~scalegpt.config.run.READING`, as the trainer has them.

        Returns:
            The evaluation, with ``loss`` in nats per token, ``perplexity``, ``bits_per_byte``, ``tokens``, ``bytes`` and
            ``documents``. Of several sources it is their mean by weight, and ``sources`` has the evaluation of each.

        Raises:
            InputError: a value outside its bounds; the text cannot be read, or the run's data are missing.
            RunError: the model diverged in training: its loss is not finite.
        """
        given = {"stride": stride, "micro_batch": micro_batch}
        settings = EvaluationSettings.from_mapping(given, "evaluate()")
        for key in reading:
            if key not in READING:
                raise InputError(f"evaluate(): unknown key {shown(key)}{nearest(key, READING)}")
        texts = list(self._texts(input_file, split, DataConfig.from_mapping(reading, "evaluate()")))
        found: list[Evaluation] = []
        for text in texts:
            report = None if progress is None else part_of(progress, found, len(texts))
            found.append(
                evaluate(self.model, text, stride=settings.stride, micro_batch=settings.micro_batch, progress=report)
            )
        return found[0] if len(found) == 1 else mean_of(found)

    def _texts(self, input_file: Inputs | None, split: str | None, reading: DataConfig) -> Iterator[Text]:
        """The text of each source, with its name and weight."""
        if split not in (None, *SPLITS):
            raise InputError(f"split must be {' or '.join(SPLITS)}, not {shown(split)}")
        if input_file is None:
            for own in tokens_of_run(self.header).sources:
                yield text_of_split(own.tokens, split or "val")._replace(name=own.name, weight=own.weight)
            return
        sources = sources_of(as_text(input_file))
        shares = shares_of([source.weight for source in sources])
        for source, share in zip(sources, shares, strict=True):
            yield self._text(source.text, split, reading)._replace(name=source.text, weight=share / MIXTURE_BLOCK)

    def _text(self, input_file: str, split: str | None, reading: DataConfig) -> Text:
        path = prepared_at(input_file)
        if path is not None:
            return text_of_split(tokens_of_folder(path, self.tokenizer), split or "val")
        if split is not None:
            raise InputError(
                f"{one_line(input_file)} has no split {split}: it is text, and all of it is scored; omit --split, or "
                "name a folder of prepared tokens"
            )
        # Without a token before documents, training on packed ones never predicts a document's first token.
        is_packed = self.model.document_end is not None
        first = self.tokenizer.document_start
        first = self.tokenizer.end_of_text if first is None and not is_packed else first
        return text_of_files(split_inputs(input_file), self.tokenizer, reading, first)

    def all_prompt_ids(self, prompts: Sequence[str]) -> list[list[int]]:
        """The token ids of each prompt, as :meth:`prompt_ids` gives them.

        If there are several prompts, errors name the number of the prompt.
        """
        ids_of_each = []
        for number, prompt in enumerate(prompts, start=1):
            try:
                ids_of_each.append(self.prompt_ids(prompt))
            except InputError as error:
                raise InputError(f"prompt {number}: {error}" if len(prompts) > 1 else str(error)) from None
        return ids_of_each

    def prompt_ids(self, prompt: str) -> list[int]:
        """The token ids of a prompt, after the token that begins a text if the tokenizer has one.

        For an empty prompt this is the token that begins a text, else the end-of-text token, else a newline.

        Raises:
            InputError: the vocabulary lacks a character of the prompt, or the newline.
        """
        ids = self.tokenizer.prompt_ids(prompt)
        if prompt or ids:
            return ids
        try:
            return [int(token) for token in self.tokenizer.encode("\n")]
        except InputError:
            raise InputError(
                "an empty prompt needs a newline, which this model's vocabulary lacks; give a prompt"
            ) from None
