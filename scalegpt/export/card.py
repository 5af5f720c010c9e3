"""The model card (``README.md``) of an exported folder: what the model is, and how it was trained."""

from scalegpt import __version__
from scalegpt.architecture.counting import count_parameters
from scalegpt.export.source import Source

_SHOWN = ("optimizer", "learning_rate", "schedule", "weight_decay", "precision")
"""The training settings that the card lists."""


def model_card(source: Source, family: str) -> str:
    """The text of the card, with the front matter that Hugging Face's hub reads. It names none of the user's files.

    Args:
        source: the model.
        family: the name of its class in transformers.
    """
    model, header = source.model, source.header
    progress, train = header.progress, header.train
    name = str(header.config.get("name") or "model")
    facts = {
        "Parameters": f"{count_parameters(model).total:,}",
        "Layers, width, heads": f"{model.n_layer}, {model.n_embd}, {model.n_head}",
        "Context": f"{model.block_size:,} tokens",
        "Vocabulary": f"{model.vocab_size:,} tokens, tokenizer {source.tokenizer.kind}",
        "Trained for": f"{progress.step:,} steps, {progress.tokens:,} tokens",
        "Held-out loss": None if progress.val_loss is None else f"{progress.val_loss:.4f} nats per token",
        **{key.replace("_", " ").capitalize(): train.get(key) for key in _SHOWN if progress.step},
    }
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items() if value is not None)
    return f"""\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- scalegpt
---

# {name}

A language model, trained with ScaleGPT {__version__} and written for transformers as `{family}`, in {source.dtype}.

| | |
|---|---|
{rows}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForCausalLM.from_pretrained("FOLDER")
tokens = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**tokens, max_new_tokens=50)[0]))
```
"""
