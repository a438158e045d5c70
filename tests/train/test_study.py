"The study: the grid is the paper's, a stopped study goes on, what fails is named, and the committed runs are complete."
import dataclasses, json, os, re, signal, subprocess, sys, time
from pathlib import Path

import pandas as pd
import pytest
import torch
from scipy import stats

from vitdynconv.study import plan as study_plan
from vitdynconv.layers.activations import ACTIVATIONS
from vitdynconv.models.paper import TABLE2
from vitdynconv.study.plan import PLANS, ROW, ROWS, Job, Plan, StudyRow, jobs_of, open_study
from vitdynconv.study.measures import Finding, area, draw_verdicts, epochs_to, interval, measure_runs, paired, verdict
from vitdynconv.study.predictions import ACCURACY, decidable, evidence, findings, holm, judge, net, p_value
from vitdynconv.study.runs import best_rate, rate_beyond, run_study, study_model, trials_so_far

RESULTS = Path(__file__).resolve().parents[2]/"nbs/results/convergence"
CHEAP = next(row for row in ROWS if row.base == "vit")
TINY = Plan(rows=(CHEAP,), seeds=(1,), rates=(1e-3, 2e-3), epochs=1, copies=1)


def key(row): return tuple(dataclasses.asdict(row).values())


def test_the_grid_is_table_2_and_the_depth_wise_rows():
    assert len(TABLE2) == 19 and len(set(ROWS)) == 22
    for row, wanted in zip(ROWS, TABLE2):
        assert (row.activation, row.pos, row.cls, row.kernel) == (wanted["activation"], wanted["pos"], wanted["class_token"], "pair")
        assert (row.base == "vit") == wanted["base"].startswith("deit")
    assert [key(row)[:4] for row in ROWS[19:]] == [("vit", "scaling", "depthwise", "abs"), ("vit", "scaling", "depthwise", "rel"), ("swin", "scaling", "depthwise", "rel")]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_network_is_what_its_row_says(row):
    model = study_model(row, 1)
    names = {name for name, _ in model.named_parameters()}
    assert any("relative_position_bias_table" in name for name in names) == (row.pos == "rel")
    assert ("cls_token" in names) == row.cls
    assert any(name.endswith("attn.qk.weight") for name in names) == (row.kernel == "depthwise")
    assert any(name.startswith("layers.") for name in names) == (row.base == "swin")
    if row.kernel == "pair": assert {type(m) for n, m in model.named_modules() if n.endswith("attn.act")} == {ACTIVATIONS[row.activation]}


def test_rows_share_their_first_weights():
    a, b = (study_model(row, 3).state_dict() for row in (ROWS[4], ROWS[6]))
    assert a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)
    name = "blocks.0.mlp.fc1.weight"
    assert not study_model(ROWS[4], 4).state_dict()[name].equal(a[name])


def test_a_stopped_study_goes_on(tmp_path):
    lines = run_study(TINY, tmp_path, workers=2)
    assert list(lines.columns[:7]) == [*ROW, "seed", "epoch"] and len(lines) == 1
    files = sorted((tmp_path/"runs").iterdir())
    assert len(files) == 3
    before = {file: (file.stat().st_mtime_ns, file.read_text()) for file in files}
    gone = Job(CHEAP, 1, None, "test").file(tmp_path)
    gone.unlink()
    again = run_study(TINY, tmp_path, workers=1)
    assert again.drop(columns="seconds").equals(lines.drop(columns="seconds"))       # the same numbers, made again
    assert all((file.stat().st_mtime_ns, file.read_text()) == before[file] for file in files if file != gone)
    about = json.loads((tmp_path/"study.json").read_text())
    assert about["versions"]["torch"] and about["machine"] and about["plan"]["epochs"] == 1
    with pytest.raises(ValueError, match="holds another study: epochs is 1 there and 16 here"): study_plan.open_study(dataclasses.replace(TINY, epochs=16), tmp_path)
    with pytest.raises(ValueError, match="rows is 1 networks there and 22 networks here"): study_plan.open_study(PLANS["digits"], tmp_path)
    (tmp_path/"study.json").write_text(json.dumps(about | dict(versions=about["versions"] | dict(timm="0.1"))))
    with pytest.raises(ValueError, match="timm is 0.1 there"): study_plan.open_study(TINY, tmp_path)
    (tmp_path/"study.json").unlink()
    with pytest.raises(ValueError, match="study.json is missing"): study_plan.open_study(TINY, tmp_path)


def test_a_job_that_fails_is_named_and_the_rest_is_kept(tmp_path):
    study_plan.open_study(TINY, tmp_path)
    trial = Job(CHEAP, TINY.tuning_seed, 1e-3, "tune")
    for lr in TINY.rates: dataclasses.replace(trial, lr=lr).file(tmp_path).write_text("epoch,valid_loss\n1,2\n")     # no learning rate: the reported run cannot choose
    with pytest.raises(RuntimeError, match=f"{CHEAP}, seed 1, ended with exit code 1.*Finished runs are kept"): run_study(TINY, tmp_path, workers=1)
    assert trial.file(tmp_path).exists() and (tmp_path/"tuning.csv").exists()
    assert not Job(CHEAP, 1, None, "test").file(tmp_path).exists()


def test_ctrl_c_keeps_what_is_done_and_says_so(tmp_path):
    code = f"from vitdynconv.study import command, plan; plan.PLANS['quick'] = plan.Plan(({CHEAP!r},), seeds=(1,), rates=(1e-3, 2e-3), epochs=1, copies=1); command.vdc_study(plan='quick', out={str(tmp_path/'out')!r}, workers=1)"
    command = [sys.executable, "-W", "ignore", "-c", code.replace("(StudyRow(", "(plan.StudyRow(")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler)) as run:
        while not list((tmp_path/"out"/"runs").glob("*.csv")): time.sleep(.2); assert run.poll() is None
        os.killpg(run.pid, signal.SIGINT)                                            # as a terminal does: to every process of the group
        _, said = run.communicate(timeout=120)
    assert run.returncode == 130 and "finished runs are kept" in said and len(said.strip().splitlines()) == 1, said
    assert not list((tmp_path/"out"/"runs").glob("*.tmp")) and len(pd.read_csv(tmp_path/"out"/"tuning.csv"))


def test_a_row_of_which_every_rate_diverges_is_refused():
    with pytest.raises(ValueError, match=r"every learning rate tried ended without a loss: \[0.001, 0.002\]"): best_rate(pd.DataFrame(dict(epoch=[1, 1], peak_lr=[1e-3, 2e-3], valid_loss=[float("nan")]*2)))


COMMITTED = pytest.mark.parametrize("name, folder", [("main", RESULTS), ("digits", RESULTS/"digits")])


@COMMITTED
def test_the_committed_runs_are_complete(name, folder):
    "Every row, seed and epoch of the plan is in the tables that results/convergence reads."
    plan, about = PLANS[name], json.loads((folder/"study.json").read_text())
    asked = json.loads(json.dumps(dataclasses.asdict(plan)))
    assert about["plan"].items() <= asked.items() and about["plan"].keys() >= {"rows", "seeds", "rates", "epochs"} and about["machine"] and about["versions"]["torch"]
    history, tuning = (pd.read_csv(folder/f"{table}.csv") for table in ("history", "tuning"))
    seeds = plan.seeds[:history.seed.nunique()]                                         # a study that was stopped has all rows, with fewer seeds
    assert len(seeds) >= 3 and (name == "main" or seeds == plan.seeds)
    found = sorted(map(tuple, history[[*ROW, "seed", "epoch"]].values.tolist()))
    assert found == sorted((*key(row), seed, epoch) for row in plan.rows for seed in seeds for epoch in range(1, plan.epochs + 1))
    assert set(tuning.seed) == {plan.tuning_seed} and history.train_loss.notna().all() and history.accuracy.between(0, 1).all()
    for row in plan.rows:
        same = pd.Series(dataclasses.asdict(row))
        trials, lines = (table[(table[ROW] == same).all(axis=1)] for table in (tuning, history))
        rates = sorted(set(trials.peak_lr))
        assert set(plan.rates) <= set(rates) and trials.groupby("peak_lr").epoch.apply(list).map(lambda epochs: epochs == [*range(1, plan.epochs + 1)]).all(), row
        assert set(lines.peak_lr) == {best_rate(trials)}, row                           # the rate of the reported runs is the one that the trials chose
        assert not plan.extend or rates[0] < best_rate(trials) < rates[-1], row         # and lies inside its list


@pytest.mark.parametrize("words, complaint", [(["--plan", "big"], "--plan 'big' is unknown; choose from full, main, digits, quick"), (["--workers=-1"], "--workers -1 is no number"), (["--out", "{file}"], "is a file")])
def test_wrong_arguments_cost_nothing(tmp_path, words, complaint):
    (tmp_path/"taken").write_text("")
    words = [word.format(file=tmp_path/"taken") for word in words]
    done = subprocess.run([sys.executable, "-W", "ignore", "-m", "vitdynconv.study.command", *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and complaint in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["taken"]


def test_the_measures():
    assert epochs_to([2.2, 2.0, 1.4], 1.5) == pytest.approx(2 + 5/6) and epochs_to([2.2, 2.1], 2) == 2 and epochs_to([1.9], 2) == 1
    assert area([4, 2, 1]) == pytest.approx((3 + 1.5)/2) and area([2.]) == 2
    lines = pd.DataFrame([dict(dataclasses.asdict(ROWS[0]), seed=s, epoch=e, peak_lr=1e-3, train_loss=3 - e*s/2, accuracy=e/10) for s in (1, 2) for e in (2, 1, 3)])
    runs = measure_runs(lines).set_index("seed")                                    # epochs out of order: sorted first
    assert runs["epochs to 2"].tolist() == [2, 1] and runs["accuracy"].tolist() == pytest.approx([30, 30]) and runs["final loss"].tolist() == [1.5, 0]


def test_differences_are_paired_by_seed():
    runs = pd.DataFrame([dict(dataclasses.asdict(row), seed=s, accuracy=10*s + d) for row, d, seeds in ((ROWS[0], 1., (1, 2, 3)), (ROWS[1], 0., (3, 2, 4, 1))) for s in seeds])
    assert paired(runs, ROWS[0], ROWS[1], "accuracy").to_dict() == {1: 1, 2: 1, 3: 1}
    with pytest.raises(ValueError, match="no runs of swin-softmax"): paired(runs, ROWS[0], ROWS[10], "accuracy")
    with pytest.raises(ValueError, match="1 value has no"): interval([1.])
    values = [1., 2., 4.]
    assert interval(values)[1:] == pytest.approx(tuple(stats.t.interval(.95, 2, loc=7/3, scale=stats.sem(values))))
    runs.loc[runs.activation == "softmax", "accuracy"] += [0., .1, -.1]
    assert verdict(Finding("", "", ROWS[0], ROWS[1], "accuracy", "more"), runs)["verdict"] == "confirmed"
    assert verdict(Finding("", "", ROWS[0], ROWS[1], "accuracy", "less"), runs)["verdict"] == "contradicted"
    assert verdict(Finding("", "", ROWS[0], ROWS[1], "accuracy", "more", (ROWS[0], ROWS[1])), runs)["mean"] == 0


def test_the_fashion_plan_starts_with_the_main_rows_and_lets_no_optimum_stay_at_an_end():
    full, main = PLANS["full"], PLANS["main"]
    assert full.data == main.data == "fashion" and full.rows[:len(main.rows)] == main.rows and set(ROWS) <= set(full.rows)
    assert {(row.activation, row.kernel) for row in main.rows if row.base == "swin"} == {(a, "pair") for a in ("softmax", "scaling", "scaling_relu", "ln", "ln_relu")} | {("scaling", "depthwise")}
    assert all(row.pos == "rel" for row in main.rows) and len(main.seeds) >= 5 and main.extend > 0
    for base, size in ("vit", 28), ("swin", 24): assert study_model(next(r for r in main.rows if r.base == base), 1, "fashion")(torch.zeros(2, 1, size, size)).shape == (2, 10)


def test_a_list_of_rates_grows_until_the_best_has_worse_ones_on_both_sides(tmp_path):
    plan = dataclasses.replace(PLANS["main"], rows=PLANS["main"].rows[:1], rates=(1e-3, 2e-3), extend=3)
    row, losses = plan.rows[0], {1e-3: .5, 2e-3: .4, 4e-3: .3, 8e-3: .6}
    (tmp_path/"runs").mkdir()
    def write(lr): pd.DataFrame([dict(epoch=1, peak_lr=lr, valid_loss=losses[lr])]).to_csv(Job(row, plan.tuning_seed, lr, "tune").file(tmp_path), index=False)
    assert trials_so_far(plan, row, tmp_path)[1] is None, "nothing is known yet"
    for lr in plan.rates: write(lr)
    for lr in 4e-3, 8e-3:
        assert trials_so_far(plan, row, tmp_path)[1].lr == lr
        write(lr)
    jobs, further = trials_so_far(plan, row, tmp_path)
    assert further is None and [job.lr for job in jobs] == [1e-3, 2e-3, 4e-3, 8e-3]
    losses |= {8e-3: .2, 16e-3: .1}
    for lr in 8e-3, 16e-3: write(lr)
    assert trials_so_far(plan, row, tmp_path)[1] is None, "three times at most"
    assert rate_beyond(pd.DataFrame(dict(epoch=1, peak_lr=[1e-3, 2e-3], valid_loss=[.1, .2]))) == 5e-4


def test_every_prediction_is_about_rows_that_are_run():
    every = findings((.7, .5))
    assert {f.row for f in every} | {f.other for f in every} | {r for f in every if f.minus for r in f.minus} <= set(ROWS)
    assert len(every) == len(ACCURACY) + 24 and len({f.claim for f in every}) == len(every)


def test_as_good_is_judged_by_the_margin_of_the_plan():
    runs = pd.DataFrame([dict(dataclasses.asdict(row), seed=s, accuracy=88 + s / 10 + gain) for row, gain in ((ROWS[0], -2), (ROWS[1], 0)) for s in range(5)])
    runs.loc[:4, "accuracy"] += [.01, .02, 0, .01, .02]
    good = Finding("", "", ROWS[0], ROWS[1], "accuracy", "as good")
    for margin, word in (3, "confirmed"), (1, "contradicted"):
        assert judge([good], runs, margin).verdict.tolist() == [verdict(good, runs, margin)["verdict"]] == [word]
    assert PLANS["main"].margin == PLANS["full"].margin == 1 and PLANS["digits"].margin == 3


def test_predictions_about_networks_that_were_not_run_are_left_out():
    swin = [net("swin", name) for name in ("softmax", "scaling")]
    runs = pd.DataFrame([dict(dataclasses.asdict(row), seed=s, accuracy=88 + s / 10 + s * i / 100) for i, row in enumerate(swin) for s in range(3)])
    assert [f.claim for f in decidable(ACCURACY, runs)] == evidence(runs).claim.tolist() == ["Swin with a scale alone is as good as with softmax"]
    assert evidence(runs).p[0] == p_value(decidable(ACCURACY, runs)[0], runs), "one question, no adjustment"


def test_another_margin_needs_no_new_run(tmp_path):
    plan = PLANS["quick"]
    open_study(plan, tmp_path / "study")
    open_study(dataclasses.replace(plan, margin=.5, thresholds=(1., .5)), tmp_path / "study")
    with pytest.raises(ValueError, match="epochs is 2 there and 3 here"): open_study(dataclasses.replace(plan, epochs=3), tmp_path / "study")


def test_holm():
    assert holm([.01, .04, .03, .005]) == pytest.approx([.03, .06, .06, .02]) and holm([.6, .9]) == [1, 1]
    row, other = ROWS[0], ROWS[1]
    runs = pd.DataFrame([dict(dataclasses.asdict(each), seed=s, accuracy=a) for each, values in ((row, (3, 4.2, 5, 5.8)), (other, (1, 2, 3, 4))) for s, a in enumerate(values)])
    one = Finding("", "", row, other, "accuracy", "more")
    assert p_value(one, runs) == pytest.approx(stats.ttest_1samp([2, 2.2, 2, 1.8], 0).pvalue)
    assert judge([one], runs).verdict.tolist() == ["confirmed"]
    weak = runs.assign(accuracy=[1.2, 2.6, 3.1, 4.7, 1, 2, 3, 4])
    assert verdict(one, weak)["verdict"] == "not visible" or p_value(one, weak) < .05
    near = runs.assign(accuracy=[1.5, 3., 3.9, 5.4, 1, 2, 3, 4])                      # alone it is confirmed; among ten it may be luck
    assert verdict(one, near)["verdict"] == "confirmed" and judge([one]*10, near).verdict.tolist() == ["not visible"]*10
    assert judge([one]*10, near).alone.tolist() == ["confirmed"]*10 == judge([one], near).alone.tolist()*10
    good = dataclasses.replace(one, expected="as good")
    assert p_value(good, near) < p_value(one, near), "as good is measured from the margin"


def test_a_verdict_that_the_adjustment_keeps_back_is_drawn_hollow():
    "Confirmed among few, confirmed alone, visible neither way: filled, hollow, a stroke."
    lines = pd.DataFrame([dict(claim=str(i), expected="more", low=low, mean=low + 1, high=low + 2, verdict=said, alone=alone)
                          for i, (low, said, alone) in enumerate([(1., "confirmed", "confirmed"), (.1, "not visible", "confirmed"), (-1., "not visible", "not visible")])])
    middles = draw_verdicts(lines, "points").axes[0].lines[1:6:2]
    assert [line.get_marker() for line in middles] == ["o", "o", "|"]
    assert [line.get_markerfacecolor() == "none" for line in middles] == [False, True, False]
    assert [line.get_label() for line in middles] == ["confirmed", "not after Holm", "not visible"]


@pytest.mark.parametrize("page", ["learned.ipynb", "results/convergence.ipynb"])
def test_two_pages_give_the_same_verdicts(page):
    "Each claim that a page shows with a verdict has the verdict of `evidence`, with Holm's adjustment."
    plan = PLANS["main"]
    found = evidence(measure_runs(pd.read_csv(RESULTS/"history.csv"), plan.thresholds), plan.margin)
    outputs = [o.get("data", {}) for c in json.loads((RESULTS.parents[1]/page).read_text())["cells"] for o in c.get("outputs", [])]
    text = "\n|".join("".join(each.get("text/markdown", "")) + "".join(each.get("text/html", "")) for each in outputs)
    shown = 0
    for claim, verdict, before_holm in zip(found.claim, found.verdict, found.alone):
        for place in re.finditer(re.escape(claim), text):
            row = re.split(r"\n\||</tr>", text[place.end():])[0]
            alone = re.search(r" \(alone: ([a-z ]+)\)", row)
            words = [word for word in ("confirmed", "not visible", "contradicted") if word in row.replace(alone[0] if alone else "", "")]
            assert words == [verdict] and (not alone or alone[1] == before_holm != verdict), (claim, words, verdict, before_holm)
            shown += 1
    assert shown >= (found.verdict != "not visible").sum()
