"""The published forms of editing benchmarks, one function a form: a record in, a case out.

Every function raises BadRequestError, KeyError, TypeError or AttributeError for a record that is not usable; the reader
lists it with that reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from guardedit.errors import BadRequestError
from guardedit.evaluation.cases import EvalCase, Question
from guardedit.records import EditRequest

PLACEHOLDERS = ("<|endoftext|>", "")
"""What files write where they have no old answer."""
GROUPS = {
    "reasoning": "reasoning",
    "subject_aliasing": "subject_aliasing",
    "logical_generalization": "logical_generalization",
    "relation_specificity": "relation_specificity",
    "forgetfulness": "forgetfulness",
}
"""KnowEdit's groups, in small letters -> ours."""


def short(record: dict[str, Any]) -> EvalCase:
    """CounterFact's short form: the subject stands in the prompt; one paraphrase, one neighbour."""
    if record.get("locality_ground_truth", record["ground_truth"]) != record["ground_truth"]:
        raise BadRequestError(
            "the neighbour's answer is not the old object, so it cannot be scored against the new"
        )
    return EvalCase(
        case_id=str(record["case_id"]),
        request=_request(record["subject"], record["prompt"], record["target_new"], record["ground_truth"]),
        paraphrases=(record["rephrase_prompt"],),
        neighborhood=(record["locality_prompt"],),
        split=record.get("split"),
    )


def rome(record: dict[str, Any]) -> EvalCase:
    """CounterFact as ROME published it, with what CounterFact+ and EasyEdit's portability files add to it."""
    request = _rewrite(record["requested_rewrite"])
    return EvalCase(
        case_id=str(record["case_id"]),
        request=request,
        paraphrases=tuple(record.get("paraphrase_prompts", ())),
        neighborhood=tuple(record.get("neighborhood_prompts", ())),
        distractors=tuple(record.get("distracting_neighborhood_prompts", ())),
        attributes=tuple(record.get("attribute_prompts", ())),
        # The published lists repeat a prompt to draw several texts from it.
        generation=tuple(dict.fromkeys(record.get("generation_prompts", ()))),
        references=tuple(record.get("reference_texts", ())),
        questions=tuple(_rome_questions(record, request)),
        split=record.get("split"),
    )


def _rome_questions(record: dict[str, Any], request: EditRequest) -> Iterator[Question]:
    yield from _one_hop(record)
    if "alternative_subject" in record:
        alias = request.prompt.replace("{}", record["alternative_subject"])
        yield Question(group="subject_aliasing", prompt=alias, answers=(request.target_new,))
    if "unrelated_relation" in record:
        probe = record["unrelated_relation"]
        yield Question(group="unrelated_relation", prompt=probe["question"], answers=(probe["object"],))


def zsre_mend(record: dict[str, Any]) -> EvalCase:
    """zsRE as MEND published it, with EasyEdit's one-hop, inverse and alias questions where they are there."""
    old, new = _texts(record["answers"]), record["alt"]
    questions = list(_one_hop(record))
    if "loc" in record:
        questions.append(
            Question(group="unrelated_question", prompt=record["loc"], answers=_texts(record["loc_ans"]))
        )
    if "inverse question" in record:
        inverse = record["inverse question"]
        questions.append(Question(group="inverse_relation", prompt=inverse, answers=(record["subject"],)))
    if "alter_subject_question" in record:
        alias = record["alter_subject_question"]
        questions.append(Question(group="subject_aliasing", prompt=alias, answers=(new,)))
    return EvalCase(
        case_id=str(record["case_id"]),
        request=_request(record["subject"], record["src"], new, old[0] if old else None),
        paraphrases=(record["rephrase"],),
        questions=tuple(questions),
    )


def knowedit(record: dict[str, Any]) -> EvalCase:
    """KnowEdit, train and test form alike: groups are lists of objects, or objects of parallel lists."""
    questions = (
        *_groups(record.get("portability", {})),
        *_groups(record.get("locality", {})),
    )
    old = _texts(record.get("ground_truth", ()))
    return EvalCase(
        case_id=str(record["case_id"]),
        request=_request(record["subject"], record["prompt"], record["target_new"], old[0] if old else None),
        paraphrases=_texts(record.get("rephrase_prompt", ())),
        questions=questions,
        same_subject=tuple(q.prompt for q in questions if q.group == "relation_specificity"),
    )


def mquake(record: dict[str, Any]) -> EvalCase:
    """MQuAKE: several edits that belong together, and one question over all of them in several wordings."""
    requests = [_rewrite(rewrite) for rewrite in record["requested_rewrite"]]
    if not requests:
        raise BadRequestError("requested_rewrite is empty")
    answers = (record["new_answer"], *record.get("new_answer_alias", ()))
    questions = [Question(group="multi_hop", prompt=text, answers=answers) for text in record["questions"]]
    return EvalCase(
        case_id=str(record["case_id"]),
        request=requests[0],
        more=tuple(requests[1:]),
        questions=tuple(questions),
        split=record.get("split"),
    )


def halluedit(record: dict[str, Any]) -> EvalCase:
    """HalluEditBench: the right object is the new target; what today's model says instead is asked of it."""
    questions = [
        Question(
            group="multi_hop", prompt=record[f"question_{hops}hop"], answers=(record[f"answer_{hops}hop"],)
        )
        for hops in range(2, 7)
        if record.get(f"question_{hops}hop")
    ][:1]
    if record.get("reversed_relation_question"):
        reverse = record["reversed_relation_question"]
        questions.append(Question(group="inverse_relation", prompt=reverse, answers=(record["subject"],)))
    if record.get("locality_question"):
        questions.append(Question(group="unrelated_question", prompt=record["locality_question"], answers=()))
    return EvalCase(
        case_id=str(record["case_id"]),
        request=_request(record["subject"], record["question"], record["object"], None),
        paraphrases=_texts(record.get("paraphrased_question") or ()),
        questions=tuple(questions),
        split=record.get("topic"),
    )


def _request(subject: str, prompt: str, new: str, old: str | None) -> EditRequest:
    """The edit of a record whose prompt has the subject in it."""
    if subject not in prompt:
        raise BadRequestError(f"subject {subject!r} is not in prompt {prompt!r}")
    known = old is not None and old.strip() not in PLACEHOLDERS
    stem = prompt.replace(subject, "{}", 1)
    return EditRequest(subject=subject, prompt=stem, target_new=new, target_true=old if known else None)


def _rewrite(rewrite: Mapping[str, Any]) -> EditRequest:
    """The edit of a record in ROME's form."""
    return EditRequest(
        subject=rewrite["subject"],
        prompt=rewrite["prompt"],
        target_new=rewrite["target_new"]["str"],
        target_true=rewrite["target_true"]["str"],
        relation=rewrite.get("relation_id"),
    )


def _one_hop(record: dict[str, Any]) -> Iterator[Question]:
    """EasyEdit's one-hop portability question, where the record has it."""
    hop = record.get("portability")
    if hop:
        yield Question(group="one_hop", prompt=hop["New Question"], answers=(hop["New Answer"],))


def _groups(groups: Mapping[str, Any]) -> Iterator[Question]:
    for name, entries in groups.items():
        if name.lower() not in GROUPS:
            raise BadRequestError(f"group {name!r} is unknown; there are {', '.join(GROUPS)}")
        for prompt, truth in _entries(entries):
            answers = _texts(truth)
            if answers:  # a few published questions have an empty list of answers
                yield Question(group=GROUPS[name.lower()], prompt=prompt, answers=answers)


def _entries(entries: Any) -> Iterator[tuple[str, Any]]:
    """(prompt, ground truth) of `[{"prompt": …, "ground_truth": …}]` and of `{"prompt": […], "ground_truth": […]}`."""
    if isinstance(entries, Mapping):
        prompts, truths = entries["prompt"], entries["ground_truth"]
        if isinstance(prompts, str):
            prompts, truths = [prompts], [truths]
        if len(prompts) != len(truths):
            raise BadRequestError(f"{len(prompts)} prompts but {len(truths)} answers")
        yield from zip(prompts, truths, strict=True)
    else:
        yield from ((entry["prompt"], entry["ground_truth"]) for entry in entries)


def _texts(value: Any) -> tuple[str, ...]:
    """A text, a list of texts or a list of lists of aliases, as one tuple of different texts."""
    if isinstance(value, str):
        return (value,) if value.strip() not in PLACEHOLDERS else ()
    return tuple(dict.fromkeys(text for entry in value for text in _texts(entry)))
