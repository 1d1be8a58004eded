"""benchmarks/concurrent_requests.py: if this fails, mixed-up images could pass for right ones."""

from __future__ import annotations

from benchmarks.concurrent_requests import Answer, alone, compare, expected_metadata, mixed_requests, summary
from model.images import encode_image
from tests.fakes import LABELS, fake_pipeline


def answers_of(bodies: list[dict[str, object]], *, seed_of: list[int]) -> list[Answer]:
    """Right answers, but that request i gets the pixels of the seed of request `seed_of[i]`."""
    pipeline = fake_pipeline()
    answers = []
    for body, other in zip(bodies, seed_of, strict=True):
        files = [
            encode_image(
                alone(pipeline, body | {"seed": bodies[other]["seed"]}, index),
                "png",
                90,
                expected_metadata(pipeline, body, index),
            )
            for index in range(int(str(body["num_images"])))
        ]
        answers.append(Answer(status=200, latency_s=0.5, files=tuple(files)))
    return answers


def test_two_hundred_requests_mix_everything_and_fit_the_default_queue() -> None:
    bodies = mixed_requests(200, (128, 256), 21)
    assert bodies == mixed_requests(200, (128, 256), 21)
    assert sum(body["num_images"] for body in bodies) <= 256
    assert {body["resolution"] for body in bodies} == {128, 256}
    assert {body["class_id"] for body in bodies} == set(range(21))
    assert {body["sampler"] for body in bodies} == {"ddpm", "ddim", "dpm++"}
    assert {body["steps"] for body in bodies} == set(range(2, 9))
    assert {body["cfg_scale"] for body in bodies} >= {1.0, 4.0}


def test_compare_finds_nothing_in_right_answers() -> None:
    bodies = mixed_requests(8, (16,), len(LABELS))
    compared = compare({16: fake_pipeline()}, bodies, answers_of(bodies, seed_of=list(range(8))))
    assert compared["wrong"] == []
    assert (compared["images"], compared["largest_difference"]) == (10, 0)


def test_compare_finds_swapped_images_and_answers_that_are_none() -> None:
    bodies = mixed_requests(4, (16,), len(LABELS))
    answers = answers_of(bodies, seed_of=[1, 0, 2, 3])
    answers[2] = Answer(status=503, latency_s=0.1, files=())
    wrong = compare({16: fake_pipeline()}, bodies, answers)["wrong"]
    assert [entry["request"]["seed"] for entry in wrong] == [body["seed"] for body in bodies[:3]]


def test_summary_counts_by_status() -> None:
    answers = [Answer(status=200, latency_s=1.0, files=(b"",)), Answer(status=429, latency_s=3.0, files=())]
    served = summary(answers, total_s=4.0)
    assert served["statuses"] == {"200": 1, "429": 1}
    assert (served["images_per_s"], served["latency_p50_s"]) == (0.25, 2.0)
