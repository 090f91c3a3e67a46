"""Numbers of the tables against those worked out by hand, and sentences that say no more than the intervals."""

from __future__ import annotations

import pytest

from epi_kernels.repro.manifest import Manifest
from epi_kernels.repro.methods.config import Epi
from epi_kernels.repro.runs import Run, Train
from epi_kernels.repro.tables import TABLES, results
from epi_kernels.repro.tables.base import Rendered
from epi_kernels.repro.tables.words import compared
from epi_kernels.repro.writers.findings import OURS
from python_tests.repro_fakes import FULL_MARK, fake_task, make_preset, manifests, recipe
from python_tests.table_scores import WIN, cells, finding, mixture_score, rendered, sequential


@pytest.fixture(autouse=True)
def tasks(monkeypatch):
    monkeypatch.setattr(results, "make_task", fake_task)


def test_da_at_b_by_hand():
    table = rendered("frontier", sequential(WIN))
    for pair in ("sums → strings", "strings → sums"):
        epi = cells(table, pair, "EPI")
        assert epi["first"].values == pytest.approx((52, 55, 58)) and epi["second"].values == (60,) * 3
        assert epi["dA@B"].values == pytest.approx((12, 15, 18))
        assert epi["over WiSE-FT"].values == pytest.approx((2, 5, 8))
        assert epi["inside/below/above"] == "3/0/0"
        assert cells(table, pair, "WiSE-FT, alpha 0.5 of lr 0.001")["dA@B"].values == pytest.approx((10,) * 3)
        below = cells(table, pair, "WiSE-FT, alpha 0.5 of lr 0.0001")  # on the line from (10, 90) to (40, 60)
        assert below["dA@B"].values == pytest.approx((5,) * 3) and below["inside/below/above"] == "0/3/0"
    assert finding(table, "EPI keeps more") == (
        "Held: EPI keeps more of the first task than full SFT at the same score on the second in both directions (dA@B:"
        " sums → strings +15.0 [+7.5, +22.5]; strings → sums +15.0 [+7.5, +22.5]; 95 % intervals, n = 3)."
    )
    assert finding(table, "EPI and WiSE-FT").startswith(
        "Did not hold: EPI and WiSE-FT: no difference shown (dA@B: "
    )


def test_a_loss_is_called_a_loss_and_noise_nothing():
    lost = rendered("frontier", sequential({seed: -gain for seed, gain in WIN.items()}))
    assert finding(lost, "EPI keeps less of the first task than full SFT").startswith("Did not hold: ")
    noise = rendered("frontier", sequential({1: 30.0, 2: 5.0, 3: -2.0}))
    assert finding(noise, "EPI and full SFT").startswith(
        "Did not hold: EPI and full SFT: no difference shown ("
    )
    one_seed = rendered("frontier", sequential(WIN), seeds=[1])
    assert "EPI and full SFT: nothing claimed (" in finding(one_seed, "EPI and full SFT")
    assert not any(one.startswith(("Held", "Did not hold")) for one in one_seed.findings)


def test_a_task_that_was_not_learned_is_said_so():
    def score(run: Run, kind: str) -> float:
        learned = isinstance(run, Train) and not isinstance(run.before, Train)
        return 0.3 * FULL_MARK.get(kind, 100.0) if learned else sequential(WIN)(run, kind)

    told = [one for one in rendered("frontier", score).findings if "hardly learned (30.0 % before" in one]
    assert len(told) == 2 and all(one.startswith("Did not hold: On ") for one in told)
    assert not [one for one in rendered("frontier", sequential(WIN)).findings if "hardly" in one]


def test_rivals_and_controls_make_no_claim():
    table = rendered("frontier", sequential(WIN))
    assert finding(table, "EWC and full SFT").startswith("EWC and full SFT: no difference shown")


def test_epi_is_held_against_rivals_and_controls_too_and_a_win_claims_nothing():
    table = rendered("frontier", sequential(WIN))
    assert finding(table, "EPI beats EWC at the same score").startswith("EPI beats EWC")
    assert "difference of dA@B: sums → strings +15.0 [+7.5, +22.5]" in finding(table, "EPI beats EWC")
    lost = rendered("frontier", sequential({seed: -gain for seed, gain in WIN.items()}))
    assert finding(lost, "EPI loses to EWC at the same score").startswith("Did not hold: ")
    assert not [one for one in table.findings if "EPI beats static" in one or "EPI beats published" in one]


def test_the_same_learning_rate_is_no_fair_comparison():
    for name in ("epi-schedule", "epi-accumulation"):
        table = rendered(name, sequential(WIN))
        assert finding(table, "EPI keeps") and not [
            one for one in table.findings if one.startswith(("Held", "Did not"))
        ]


def test_notes_say_what_intervals_and_settings_do_not_cover():
    table = rendered("frontier", sequential(WIN))
    assert any("start from one base model: another one is not in the intervals" in one for one in table.notes)
    assert any("EWC's diagonal Fisher is the first stage's" in note for note in table.notes)
    mixed = rendered("epi-main", mixture_score)
    assert any("Nothing was tuned here" in note for note in mixed.notes)


def test_terms_of_ours_are_marked():
    for name, term in (
        ("frontier", "dA@B"),
        ("epi-forgetting", "Forgetting rate"),
        ("epi-conflict", "Conflict score"),
        ("drift", "Noise ceiling"),
    ):
        table = rendered(name, mixture_score if name == "epi-conflict" else sequential(WIN))
        assert any(note.startswith(f"{OURS}{term}") for note in table.notes), name


def test_conflict_is_compared_over_the_same_elements_in_the_same_part_of_the_budget():
    table = rendered("epi-conflict", mixture_score)
    full, epi, static = (cells(table, name) for name in ("full SFT, all tasks at once", "EPI", "static"))
    # 41 steps, the static mask's last 31; the first point of a run has 10 points more, and counts where step >= 10
    assert full["all elements"].values == pytest.approx((8,) * 3) and full["free elements"] == "-"
    assert epi["all elements"].values == pytest.approx((5.1, 5.2, 5.3))
    assert static["all elements"].values == pytest.approx(((18 + 8 + 8) / 3,) * 3)
    assert static["free elements"].values == pytest.approx(((19 + 9 + 9) / 3,) * 3)
    assert epi["topics"].values == pytest.approx((5.1, 5.2, 5.3))
    said = finding(table, "EPI has less conflict than full SFT")
    assert said.startswith("Held: ") and "points less, over all elements: +2.8" in said
    assert "-3.3 (all 3 seeds equal)" in finding(table, "static and full SFT")
    said = finding(table, "What EPI leaves free conflicts less than all elements at the same weights")
    assert not said.startswith("Held") and "+1.2" in said
    assert "-1.0 (all 3 seeds equal)" in finding(table, "What static leaves free and all elements")
    assert any("Averaged from step 10 of the budget on" in note for note in table.notes)


def test_what_a_replayed_share_is_of_is_said():
    arms = make_preset().sequential.model_dump()
    assert not [note for note in rendered("frontier", sequential(WIN)).notes if "replay and PCGrad" in note]
    for method in ("replay", "pcgrad"):
        arms["arms"][method] = {"tries": [{"method": {"name": method}}]}
        told = rendered("frontier", sequential(WIN), sequential=arms).notes
        assert [note for note in told if "Share, of replay and PCGrad: of every batch's rows" in note]
        del arms["arms"][method]


@pytest.mark.parametrize(
    ("learn", "words"),
    [
        (recipe(), "sums → strings: 40 steps of 8 examples, then 20 steps of 8: as many steps as in the table frontier, not as"
         " many epochs: every example is seen more often."),
        (recipe(steps=30), "sums → strings: 30 steps of 8 examples, then 20 steps of 8."),
    ],
)  # fmt: skip
def test_little_data_says_how_many_steps_it_gets(learn, words):
    setting = make_preset().low_resource.model_dump()
    setting["tasks"] = {kind: {"kind": kind, "share": 0.1} for kind in ("sums", "strings")}
    setting["sequential"]["pairs"][0]["learn"] = learn
    assert f"Length. {words}" in rendered("low-resource", sequential(WIN), low_resource=setting).notes


def test_as_many_epochs_of_little_data_are_fewer_steps():
    plan, setting = make_preset().sequential.model_dump(), make_preset().low_resource.model_dump()
    setting["tasks"] = {kind: {"kind": kind, "share": 0.1} for kind in ("sums", "strings")}
    epochs = {"lr": 1e-3, "epochs": 2.0, "batch": 8}
    for pair in (*plan["pairs"], *setting["sequential"]["pairs"]):
        pair |= {"learn": epochs, "adapt": epochs}
    notes = rendered("low-resource", sequential(WIN), low_resource=setting, sequential=plan).notes
    (note,) = [one for one in notes if one.startswith("Length.")]
    assert note.endswith("as many epochs as in the table frontier, so that steps shrink with the data.")


def test_own_importance_has_a_row_at_the_shared_beta():
    labels = list(TABLES["epi-beta"].variants(make_preset()))
    assert (
        labels[:2] == ["shared with exp_avg_sq, beta 0.999", "own, beta 0.9"] and "own, beta 0.999" in labels
    )
    assert any("they start at zero" in note for note in rendered("epi-beta", sequential(WIN)).notes)


def test_changes_and_the_forgetting_rate_by_hand():
    changes = rendered("cpift-2", sequential(WIN))
    full = cells(changes, "sums → strings", "full SFT, lr 0.001")
    assert full["first, change"].values == pytest.approx((-70,) * 3)
    assert full["second, change"].values == pytest.approx((70,) * 3) and full["first, change"].paper is None
    assert finding(changes, "EPI and full SFT at its best rate").count("-20.0 (all 3 seeds equal)") == 2
    rate = rendered("epi-forgetting", sequential(WIN))
    assert cells(rate, "EPI")["forgetting rate"].values == pytest.approx((38, 35, 32))
    assert cells(rate, "full SFT, lr 0.0001")["forgetting rate"].values == pytest.approx((30,) * 3)
    # Less learned is less forgotten: against another learning rate nothing is claimed.
    assert finding(rate, "EPI forgets less than full SFT, lr 0.001").startswith("EPI forgets")
    assert finding(rate, "EPI and full SFT, lr 0.0001").startswith("EPI and full SFT")
    assert finding(rate, "EPI forgets less than static").startswith("Held: ")
    plan = make_preset().model_dump()["sequential"]
    plan["arms"]["static"]["tries"][0]["lr"] = 2e-3
    unlike = rendered("epi-forgetting", sequential(WIN), sequential=plan)
    assert finding(unlike, "EPI forgets less than static").startswith("EPI forgets")


def test_masks_of_one_ratio_are_compared():
    table = rendered("epi-static-dynamic", sequential(WIN))
    assert "+10.0 [+2.5, +17.5]" in finding(table, "EPI beats static")
    worse = rendered("epi-static-dynamic", sequential(WIN, static=40.0))
    assert finding(worse, "EPI loses to static").startswith("Did not hold: ")
    arms = make_preset().model_dump()["sequential"]
    arms["arms"]["static"]["tries"][0]["method"]["ratio"] = 0.1
    assert not [
        one
        for one in rendered("epi-static-dynamic", sequential(WIN), sequential=arms).findings
        if "EPI" in one
    ]


def test_a_sweep_compares_with_the_arm_as_it_is():
    table = rendered("epi-ratio", lambda run, kind: sequential(WIN)(run, kind))
    assert [row[0] for row in table.rows] == ["10 %", "20 %", "40 %"]
    assert cells(table, "40 %")["dA@B"].values == pytest.approx((12, 15, 18))
    assert finding(table, "isolation ratio 10 % and 20 %").endswith(
        "(difference of dA@B: +0.0 (all 3 seeds equal); 95 % intervals, n = 3)."
    )
    (figure,) = table.figures
    assert "95 % intervals" in figure.caption


def test_the_criterion_beyond_takes_seeds_bytes_and_every_rival():
    gain = {seed: 20.0 + 0.1 * seed for seed in range(1, 6)}
    changes = {"seeds": [1, 2, 3, 4, 5]}
    heavy = rendered("beyond", sequential(gain), **changes)
    assert finding(heavy, "EPI: the criterion of `beyond` is not met.").startswith(
        "Did not hold"
    )  # 8.13 bytes
    preset, table = make_preset(**changes), TABLES["beyond"]
    found = manifests(table, preset, sequential(gain))
    light = {
        name: one.model_copy(
            update={"bytes": one.bytes and one.bytes.model_copy(update={"optimizer": {"total": 235}})}
        )
        for name, one in found.items()
    }
    assert table.render(preset, light).findings[0].startswith("Held: EPI meets the criterion")
    beaten = manifests(table, preset, sequential(gain, static=25.0))
    beaten = {name: one.model_copy(update={"bytes": light[name].bytes}) for name, one in beaten.items()}
    assert table.render(preset, beaten).findings[0].startswith("Did not hold: EPI")


def test_memory_is_held_against_epi_as_published():
    table = rendered("memory", sequential(WIN))
    epi = cells(table, "sums → strings", "EPI")
    assert epi["state, bytes/parameter"].values == (8.13,) * 3
    assert epi["step, of published, %"].values == pytest.approx((100 / 3,) * 3)
    mixed = cells(table, "mixture", "EPI")
    assert mixed["step, of published, %"] == "" and mixed["state, of published, %"].values[
        0
    ] == pytest.approx(62.54, abs=0.01)
    assert any(
        "13 bytes a parameter by EPI's description, not measured, for mixture" in note for note in table.notes
    )
    assert finding(table, "EPI (sums → strings) steps faster than EPI as published").startswith("Held: ")
    assert finding(table, "EPI (sums → strings) keeps").endswith("EPI as published 13.000.")
    assert finding(table, "EPI (mixture) keeps").endswith("EPI as published 13.000 by its description.")


def costs(change) -> Rendered:
    """The memory table of made-up runs, `change` made to each one's manifest."""
    preset, table = make_preset(), TABLES["memory"]
    found = manifests(table, preset, sequential(WIN))
    return table.render(preset, {name: change(one) for name, one in found.items()})


def test_a_method_of_several_stages_is_measured_over_all_of_them():
    def change(one: Manifest) -> Manifest:
        """The later a stage, the less state and the slower: 8 bytes and 1 ms, 4 bytes and 3 ms."""
        if not isinstance(one.run, Train):
            return one
        later = isinstance(one.run.before, Train)
        size = one.bytes.model_copy(update={"optimizer": {"total": 400 if later else 800}})
        time = one.time.model_copy(
            update={"optimizer_p50": 3.0 if later else 1.0, "steps": 10 if later else 30}
        )
        return one.model_copy(update={"bytes": size, "time": time})

    table = costs(change)
    for name in ("multi-stage, random, K = 2", "multi-stage, heuristic, 2 stages", "static"):
        row = cells(table, "mixture", name)
        assert row["state, bytes/parameter"].values == (8.0,) * 3, name
        assert row["optimizer step, ms"].values == pytest.approx((1.5,) * 3), name
    second = cells(table, "sums → strings", "static")
    assert second["state, bytes/parameter"].values == (4.0,) * 3
    assert second["optimizer step, ms"].values == (3.0,) * 3


def test_what_is_of_cpift_s_last_stage_alone_is_said():
    def told(table: Rendered) -> list[str]:
        return [note for note in table.notes if "last stage alone" in note]

    def of_all(one: Manifest) -> Manifest:
        return one.model_copy(update={"notes": one.notes | {"stages": 7}})

    assert len(told(costs(lambda one: one))) == 1 and not told(costs(of_all))


def test_a_peak_is_a_run_s_own_where_it_is_known():
    def own(one: Manifest) -> Manifest:
        held = {"peak": 700 << 20, "before": 680 << 20}
        return one.model_copy(update={"bytes": one.bytes and one.bytes.model_copy(update=held)})

    table = costs(own)
    assert cells(table, "sums → strings", "EPI")["peak, MiB"].values == (20.0,) * 3
    assert any("Peak: of the process, above what was held before" in note for note in table.notes)
    old = costs(lambda one: one)
    assert cells(old, "sums → strings", "EPI")["peak, MiB"].values == (1.0,) * 3
    assert any("of runs before too: rows compare little" in note for note in old.notes)


def test_tuning_says_when_the_choice_or_the_budget_is_wrong():
    def score(run: Run, kind: str) -> float:
        better = isinstance(run, Train) and isinstance(run.method, Epi) and run.method.ratio == 0.1
        return sequential({0: 30.0 if better else 10.0})(run, kind)

    table = rendered("tuning", score)
    assert [row[3].values[0] for row in table.rows if row[1] == "EPI"] == pytest.approx([10.0, 30.0])
    assert "EPI (sequential: 10.00 chosen, 30.00 reached)" in finding(
        table, "The chosen setting is not the best"
    )
    assert finding(table, "In sequential, every arm has the same number of tries, 2.").startswith("Held: ")
    plan = make_preset().model_dump()["sequential"]
    plan["arms"]["EPI"]["chosen"] = 1
    plan["arms"]["EWC"]["tries"] = plan["arms"]["EWC"]["tries"][:1]
    mended = rendered("tuning", score, sequential=plan)
    assert finding(mended, "For every arm the tables use the best setting").startswith("Held: ")
    assert "EPI 2, static 2, EWC 1, published 2" in finding(
        mended, "In sequential, the arms have not the same number"
    )


def test_tuning_names_arms_that_only_lose_to_full_fine_tuning():
    """A lower rate would seem better for them: what learns nothing has 0."""
    table = rendered("tuning", sequential({0: -3.0}, static=-7.5))
    assert "second: EPI (-3.00 at best), static (-7.50 at best). " in finding(
        table, "No setting that was tried"
    )
    assert finding(table, "preset").endswith("1 seed.")
    won = rendered("tuning", sequential({0: 3.0}))
    assert not any("No setting that was tried" in one for one in won.findings)


def test_a_sentence_names_places_that_differ_apart():
    places = {"a": [1.0, 1.1, 1.2], "b": [-1.0, -1.1, -1.2], "c": [-1.0, 0.0, 1.0]}
    assert compared(
        "X", places, "beats Y", "loses to Y", versus="Y", everywhere="everywhere", measure="points"
    ) == (
        "Did not hold: X beats Y on a (points: a +1.1 [+0.9, +1.3]); loses to Y on b (points: b -1.1 [-1.3, -0.9]);"
        " no difference shown on c (points: c +0.0 [-2.5, +2.5]); 95 % intervals, n = 3."
    )
    assert (
        compared("X", {"": [1.0]}, "beats Y", "loses to Y", versus="Y")
        == "X and Y: nothing claimed (+1.0; one seed)."
    )
    lost = [float("nan"), 1.0, 2.0]
    assert "nothing" not in compared("X", {"": lost}, "beats Y", "loses to Y", versus="Y")


def test_nothing_is_claimed_of_two_seeds_or_of_seeds_that_are_all_equal():
    """An interval of width 0 is no certainty, and of two seeds one comes about by chance."""

    def told(**places: list[float]) -> str:
        return compared("X", places, "beats Y", "loses to Y", versus="Y")

    assert told(a=[5.0, 5.0]) == "X and Y: nothing claimed (a +5.0 (all 2 seeds equal); two seeds)."
    assert told(a=[5.0, 5.1]) == "X and Y: nothing claimed (a +5.0; two seeds)."
    equal = [0.1 + 0.2, 0.3, 0.3]  # but for rounding
    assert told(a=equal) == "X and Y: nothing claimed (a +0.3 (all 3 seeds equal); 95 % intervals, n = 3)."
    assert told(a=[5.0, 5.1, 5.2]).startswith("Held: X beats Y")
    mixed = told(a=[5.0, 5.1, 5.2], b=[5.0, 5.0, 5.0])
    assert mixed.startswith("Did not hold: X beats Y on a") and "nothing claimed on b" in mixed
    assert told(a=[0.0, 0.0, 0.0]).startswith("Did not hold: X and Y: no difference shown")


def test_controls_of_epis_ratio_and_rate_stand_for_their_kind_and_a_win_over_them_holds():
    plan = make_preset().model_dump()["sequential"]
    plan["arms"]["random"] = {"tries": [{"method": {"name": "random", "ratio": 0.4}}]}
    plan["arms"]["random as EPI"] = {"like": "EPI", "but": {"name": "random"}}
    table = rendered("frontier", sequential(WIN), sequential=plan)
    assert finding(table, "EPI beats random as EPI").startswith("Held: ")
    assert not [one for one in table.findings if "EPI beats random at" in one]
    assert any("random as EPI like EPI" in note for note in table.notes)
    del plan["arms"]["random as EPI"]
    alone = rendered("frontier", sequential(WIN), sequential=plan)
    assert finding(alone, "EPI beats random at").startswith("EPI beats random")
