"""The other side of the race: EasyEdit's own functions, called as its editor class calls them.

Nothing of it is here: `--source` is a folder of its repository. Its settings are those that it ships for the model
nearest in size, with the changes that `PEERS` and `_hparams` show.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import random
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.peer_rows import Line, Rows, Solved, cases_of
from guardedit.evaluation.cases import EvalCase
from guardedit.models.corpus import read_texts

LAYERS = (3, 4, 5)
TEXT_TOKENS = 30_000


@dataclass(frozen=True)
class Peer:
    """Where a method lies in EasyEdit, and what of its shipped settings is changed."""

    main: str
    apply: str
    hparams: str
    shipped: str
    changed: Mapping[str, Any]


_HEAD = {"lm_head_module": "model.embed_tokens"}
PEERS = {
    "rome": Peer(
        "rome.rome_main", "apply_rome_to_model", "rome.rome_hparams:ROMEHyperParams", "ROME/llama3.2-3b",
        {"layers": [5], "mom2_adjustment": True, "fp16": False},
    ),
    "memit": Peer(
        "memit.memit_main", "apply_memit_to_model", "memit.memit_hparams:MEMITHyperParams", "MEMIT/llama3.2-3b",
        {"layers": [*LAYERS], **_HEAD},
    ),
    "alphaedit": Peer(
        "alphaedit.AlphaEdit_main", "apply_AlphaEdit_to_model", "alphaedit.AlphaEdit_hparams:AlphaEditHyperParams",
        "AlphaEdit/llama3-8b", {"layers": [*LAYERS], **_HEAD},
    ),
}  # fmt: skip


def peer(args: argparse.Namespace) -> None:
    """Call the peer's own apply function, a fact at a time or once for all, and take the weights back."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out, kind = args.out.resolve(), PEERS[args.method]
    model = AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.folder, padding_side="right")
    tokenizer.pad_token = tokenizer.eos_token
    sys.path.insert(0, str(args.source.resolve()))
    with contextlib.redirect_stdout(io.StringIO()):
        importlib.import_module("easyeditor")
    texts = _texts(args.data, tokenizer)
    os.chdir(out)  # it writes beside itself
    hparams = _hparams(kind, args, out, len(texts))
    main = _warm(kind, model, tokenizer, hparams, texts)
    cases = cases_of(out, args.facts)[: args.first]
    label = f"EasyEdit {args.method.upper()}" + (f" λ={args.ridge:g}" if args.ridge else "")
    groups, more = ([cases], ", one batch") if args.joint else ([[case] for case in cases], "")
    extra: Line = (
        {"cache_template": str(out / "z" / args.facts / "{}_{}_{}.npz")} if args.method == "memit" else {}
    )
    extra |= {"reset_cache": True} if args.method == "alphaedit" else {}
    for group in groups:

        def solve(group: list[EvalCase] = group) -> Solved:
            return _applied(getattr(main, kind.apply), model, tokenizer, _requests(group), hparams, extra)

        Rows(out, f"{args.facts}-peer").solve(label + more, [case.case_id for case in group], solve)


def _requests(cases: list[EvalCase]) -> list[Line]:
    return [
        {
            "case_id": case.case_id,
            "prompt": case.request.prompt,
            "subject": case.request.subject,
            "target_new": case.request.target_new.strip(),
        }
        for case in cases
    ]


def _applied(
    apply: Any, model: Any, tokenizer: Any, requests: list[Line], hparams: Any, extra: Line
) -> Solved:
    heard = io.StringIO()
    with contextlib.redirect_stdout(heard):
        _, before = apply(model, tokenizer, requests, hparams, return_orig_weights=True, **extra)
    changes = {}
    with torch.no_grad():
        for name, weight in before.items():
            parameter = model.get_parameter(name)
            changes[name] = parameter.double() - weight.double()
            parameter.copy_(weight)
    # It prints each loss it computes; after the last no step is taken.
    seen = sum(line.startswith("loss ") for line in heard.getvalue().splitlines())
    return changes, {"steps": seen - 1 if seen and len(requests) == 1 else None, "values_cached": not seen}


def _texts(data: Path, tokenizer: Any) -> list[dict[str, str]]:
    """Wikipedia passages in a drawn order until they are TEXT_TOKENS tokens."""
    passages = list(read_texts(data / "text/wikipedia_passages.jsonl.xz"))
    random.Random(1).shuffle(passages)
    taken, n_tokens = [], 0
    for text in passages:
        if n_tokens >= TEXT_TOKENS:
            break
        n_tokens += len(tokenizer(text)["input_ids"])
        taken.append({"text": text})
    return taken


def _hparams(kind: Peer, args: argparse.Namespace, out: Path, n_texts: int) -> Any:
    shipped = yaml.safe_load((args.source / "hparams" / f"{kind.shipped}.yaml").read_text())
    model = {
        "model_name": str(args.folder),
        "device": "cpu",
        "v_loss_layer": 29,
        "stats_dir": str(out / "stats"),
    }
    changed = {**shipped, **model, "mom2_n_samples": n_texts, **kind.changed}
    changed |= {"mom2_update_weight": args.ridge} if args.ridge else {}
    changed |= {"P_loc": "null_space_project.pt"} if args.method == "alphaedit" else {}
    path = out / f"{args.method}.yaml"
    path.write_text(yaml.safe_dump(changed))
    module, name = kind.hparams.split(":")
    return getattr(importlib.import_module(f"easyeditor.models.{module}"), name).from_hparams(str(path))


def _warm(kind: Peer, model: Any, tokenizer: Any, hparams: Any, texts: list[dict[str, str]]) -> Any:
    """Its second moments (from `texts` in place of a download) and sampled prefixes, before any time is taken."""
    importlib.import_module("easyeditor.models.rome.layer_stats").load_dataset = lambda *_: {"train": texts}  # type: ignore[attr-defined]
    main: Any = importlib.import_module(f"easyeditor.models.{kind.main}")
    torch.manual_seed(0)
    lengths = [hparams.context_template_length_params] if kind.main.startswith("rome") else []
    found = (
        importlib.import_module("easyeditor.models.rome.compute_u").get_inv_cov if lengths else main.get_cov
    )
    with contextlib.redirect_stdout(io.StringIO()):
        main.get_context_templates(model, tokenizer, *lengths)
        for layer in hparams.layers:
            name = hparams.rewrite_module_tmp.format(layer)
            text = (hparams.mom2_dataset, hparams.mom2_n_samples, hparams.mom2_dtype)
            found(model, tokenizer, name, *text, hparams=hparams)
        if kind.main.startswith("alphaedit") and not Path(hparams.P_loc).exists():
            projectors = [main.get_project(model, tokenizer, layer, hparams) for layer in hparams.layers]
            torch.save(torch.stack(projectors), hparams.P_loc)
    return main
