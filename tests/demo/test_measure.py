"""What the demo measures: every method of every text, side by side, as each would be alone."""

from __future__ import annotations

from typing import Any

from composable.corpora.documents import Document, Spliced
from composable.demo.measure import HeldOutTexts, measure
from composable.model.model import Model
from composable.vetting.evaluation import mix_scorer, path_scorer, safe_scorer, score_documents

TEXTS = HeldOutTexts(
    domains={
        name: [Document(f"{name}-{n}", f"{name} {n} jumped over lazy dogs") for n in range(9)]
        for name in ("german", "french")
    },
    public=[Document("public", "It was the best of times.")],
    spliced=[Spliced(b"german and french", (("german", 0, 6), ("french", 6, 17)))],
)


def test_every_text_is_scored_by_every_method(tiny: Any) -> None:
    experts = [tiny.expert(name) for name in TEXTS.domains]
    model = Model(tiny.backbone, tiny.interface, experts)
    seen: list[tuple[str, int, int]] = []
    measured = measure(model, TEXTS, progress=lambda *at: seen.append(at))
    assert [done for _, done, _ in seen] == list(range(1, 19))
    assert {total for _, _, total in seen} == {18}
    assert len({what for what, _, _ in seen}) == 18
    assert measured.intervals is not None
    assert len(measured.intervals) == 5

    for name, bits in measured.domains.items():
        documents = [document.text.encode() for document in TEXTS.domains[name][:8]]
        for method, scorer in {
            "backbone": path_scorer(model),
            "own_expert": path_scorer(model, name),
            "mix": mix_scorer(model),
            "safe": safe_scorer(model),
        }.items():
            alone = score_documents(scorer, documents, context=model.context).bits_per_byte
            assert getattr(bits, method) == round(alone, 5)
