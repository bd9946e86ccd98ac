"""docs/verified.md is what the evidence says, and evidence of other code counts for nothing."""

import json

from benchmarks import verified


def test_the_page_is_made_from_the_committed_evidence():
    assert verified.PAGE.read_text(encoding="utf-8") == verified.present()


def test_evidence_is_summed_over_processes_and_bound_to_the_code(tmp_path):
    what = ["ptx", 80, "titans.scan_kernel", "bf16"]
    for process, count in ((1, 2), (2, 3)):
        (tmp_path / f"{process}.json").write_text(json.dumps([[*what, count], ["ptx", 80, "gone", "bf16", 1]]))
    seen = verified.gathered([tmp_path])
    assert seen[tuple(what)] == 5
    (record,) = verified.taken_in([], seen, "2026-01-01")  # a kernel that no table offers is left out
    assert record["tests"] == 5 and verified.current([record]) == [record]
    assert verified.current([record | {"code": "0123456789abcdef"}]) == []
    row = next(r for r in verified.page([record]).splitlines() if r.startswith("| `titans.scan_kernel` | bf16"))
    assert row == "| `titans.scan_kernel` | bf16 | – |  | 5 | – | – |"
    (on_card,) = verified.taken_in([], {("gpu", 90, "titans.scan_kernel", "bf16"): 7}, "2026-01-02", "a card")
    assert "| 7 on a card, 2026-01-02 |" in verified.page([record, on_card])
