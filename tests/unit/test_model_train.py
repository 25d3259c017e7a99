"""Training refuses leaks and unfaithful exports, and builds the same package twice."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier

from features.fraud import FRAUD
from model import export, metrics, package, train
from model.metrics import DAY, Labelled, midnight
from model.scorer import Scorer, session

DAYS = 24


@pytest.fixture(scope="module")
def labelled() -> tuple[np.ndarray, np.ndarray]:
    """Return rows float32 [n, 4] with many ties, and labels that follow them loosely."""
    rng = np.random.default_rng(1)
    rows = np.round(rng.gamma(2.0, 20.0, size=(6000, 4)), 1).astype(np.float32)
    return rows, ((rows[:, 0] > 80) | (rows[:, 1] * rows[:, 2] > 6000)) & (rng.random(6000) < 0.8)


@pytest.fixture(scope="module")
def forest(labelled: tuple[np.ndarray, np.ndarray]) -> RandomForestClassifier:
    return RandomForestClassifier(20, max_depth=10, random_state=0).fit(*labelled)


# The export gate


def test_the_gate_asks_at_every_threshold_and_one_step_to_either_side(labelled, forest) -> None:
    rows = export.gate_rows(forest, labelled[0])
    assert len(rows) >= export.GATE_ROWS
    assert rows.dtype == np.float32
    seen = [set(column.tolist()) for column in rows.T]
    for tree in forest.estimators_:
        inner = tree.tree_.children_left >= 0
        for feature, value in zip(
            tree.tree_.feature[inner], tree.tree_.threshold[inner].astype(np.float32), strict=True
        ):
            down, up = np.nextafter(value, np.float32([-np.inf, np.inf]))
            assert {float(value), float(down), float(up)} <= seen[feature]


def test_the_gate_rows_stay_bounded(labelled, forest) -> None:
    rows = export.gate_rows(forest, labelled[0], least=100, most=400)
    assert 100 < len(rows) <= 400


def test_export_agrees_with_scikit_learn(labelled, forest) -> None:
    model, parity = export.export(forest, labelled[0])
    assert parity["rows"] >= 10_000
    assert parity["max_difference"] < 1e-6
    assert model == export.to_onnx(forest, 4), "the same model must give the same bytes"


def test_the_gate_catches_thresholds_one_float32_step_off(labelled, forest, monkeypatch) -> None:
    rows = labelled[0]
    model = onnx.load_from_string(export.to_onnx(forest, 4))
    ensemble = next(node for node in model.graph.node if node.op_type == "TreeEnsembleClassifier")
    values = next(a for a in ensemble.attribute if a.name == "nodes_values").floats
    values[:] = np.nextafter(np.array(values, dtype=np.float32), np.float32(np.inf)).tolist()
    wrong = model.SerializeToString()

    ordinary = np.random.default_rng(2).gamma(2.0, 20.0, size=(10_000, 4)).astype(np.float32)
    assert export.parity(forest, wrong, ordinary) < 1e-6, "ordinary rows do not notice"
    monkeypatch.setattr(export, "to_onnx", lambda *_: wrong)
    with pytest.raises(export.ExportError, match="no package was written"):
        export.export(forest, rows)


@pytest.mark.filterwarnings("ignore:Field onnx:DeprecationWarning")  # skl2onnx 1.20, protobuf 6
def test_boosted_trees_fitted_on_float64_do_not_pass() -> None:
    """Pins sklearn-onnx #1192: thresholds between two doubles are rounded across a value."""
    rng = np.random.default_rng(5)
    exact = rng.gamma(2.0, 20.0, size=(3000, 4))
    boosted = HistGradientBoostingClassifier(max_iter=10, random_state=0)
    boosted.fit(exact, exact[:, 0] > 80)
    with pytest.raises(export.ExportError, match="differ by"):
        export.export(boosted, exact.astype(np.float32))


def test_nan_on_either_side_is_no_agreement(labelled, forest) -> None:
    class Silent:
        def predict_proba(self, rows: np.ndarray) -> np.ndarray:
            return np.full((len(rows), 2), np.nan)

    assert export.parity(Silent(), export.to_onnx(forest, 4), labelled[0][:5]) == np.inf


# Thresholds


def test_thresholds_meet_their_own_rule() -> None:
    rng = np.random.default_rng(3)
    count = 20_000
    scores = np.round(rng.random(count), 4)
    data = Labelled(
        rng.integers(0, 7 * DAY, count),
        np.array([f"C{c:04}" for c in rng.integers(0, 2000, count)]),
        rng.random(count) < scores**4,
    )
    limits = train.choose_thresholds(data, scores)

    def cards_a_day(limit: float) -> float:
        alerts = scores >= limit
        return len({*zip(data.time[alerts] // DAY, data.card[alerts], strict=True)}) / 7

    assert cards_a_day(limits.review) >= 100 > cards_a_day(np.nextafter(limits.review, 2))
    assert data.fraud[scores >= limits.block].mean() >= 0.95
    lower = [s for s in np.unique(scores) if limits.review < s < limits.block]
    assert all(data.fraud[scores >= s].mean() < 0.95 for s in lower)


def test_nothing_is_blocked_when_no_score_is_precise_enough() -> None:
    data = Labelled(np.array([1, 2]), np.array(["C0", "C1"]), np.array([False, True]))
    limits = train.choose_thresholds(data, np.array([1.0, 0.5]))
    assert (limits.review, limits.block > 1.0) == (0.5, True)


GOOD = {"auc": 0.87, "ap": 0.68, "cp100": 0.3}


def evaluation(protocol: str = "chapter 5", **mean: float) -> train.Evaluation:
    """Return the shipped candidate's line with these figures instead of good ones."""
    nothing = np.array([], dtype=np.int64), np.array([])
    return train.Evaluation(
        train.SHIPPED,
        protocol,
        train.Judged(GOOD | mean, [], *nothing),
        cost=train.Cost(1, 1.0, 1, 0.0),
    )


# The command


def write_frame(directory: Path, *, leak: bool = False, days: int = DAYS) -> list[str]:
    """Write features and labels of made-up transactions and return the command's arguments."""
    rng = np.random.default_rng(4)
    count = days * 400
    time = np.sort(rng.integers(0, days * DAY, count)) + midnight("2018-06-01")
    values = np.round(rng.gamma(2.0, 20.0, size=(count, len(FRAUD.names))), 2)
    fraud = (rng.random(count) < 0.01) | ((values[:, 0] > 150) & (rng.random(count) < 0.7))
    if leak:
        values[:, -1] = fraud
    ids = pa.array([f"tx{i:07}" for i in range(count)])
    cards = pa.array([f"C{c:04}" for c in rng.integers(0, 3000, count)])
    columns = {"transaction_id": ids, "card_id": cards, "event_time": pa.array(time)}
    features = dict(zip(FRAUD.names, values.T, strict=True))
    directory.mkdir(exist_ok=True)
    pq.write_table(pa.table({**columns, **features}), directory / "features.parquet")
    backwards = pa.table({**columns, "label": pa.array(fraud.astype(np.int8))})[::-1]
    pq.write_table(backwards, directory / "transactions.parquet")
    return [
        *("--features", str(directory / "features.parquet")),
        *("--labels", str(directory / "transactions.parquet")),
        *("--out", str(directory / "package")),
    ]


def test_the_command_builds_a_package_that_serves(tmp_path, capsys) -> None:
    arguments = write_frame(tmp_path)
    assert train.main(arguments) == 0
    serving = Scorer.load(
        tmp_path / "package", names=FRAUD.names, schema_hash=FRAUD.schema_hash, chunk=64
    )
    start, end = midnight("2018-06-01"), midnight("2018-06-18")  # the frame ends seven days later
    training = serving.manifest.training
    assert (training.from_ms, training.to_ms) == (start, end)  # 28 days are not to be had
    assert serving.version in capsys.readouterr().out

    table = (tmp_path / "package" / "evaluation.md").read_text()
    assert train.SHIPPED.name in table
    assert "Real card data is far harder" in table
    (line,) = json.loads((tmp_path / "package" / "evaluation.json").read_text())
    assert line["protocol"] == "last 1 weeks"
    assert line["mean"]["ap"] == serving.manifest.metrics["ap"]

    frame = train.load(
        tmp_path / "features.parquet", tmp_path / "transactions.parquet", FRAUD.names
    )
    fraud = frame.data.fraud
    legitimate = frame.data.between(training.from_ms, training.to_ms)
    legitimate = legitimate[~fraud[legitimate]]
    assert serving.manifest.baseline == np.median(frame.rows[legitimate], axis=0).tolist()
    assert serving.score(frame.rows[fraud]).mean() > 3 * serving.score(frame.rows[~fraud]).mean()


def test_the_same_frame_gives_the_same_model_and_a_range_is_honoured(tmp_path) -> None:
    arguments = [*write_frame(tmp_path), "--quiet", "--train-to", "2018-06-15"]
    manifests = []
    for _ in range(2):
        assert train.main(arguments) == 0
        manifests.append(json.loads((tmp_path / "package" / "manifest.json").read_text()))
    first, second = manifests
    for name in (package.MODEL, package.GOLDEN):
        assert first["files"][name] == second["files"][name]
    assert (first["version"], first["thresholds"]) == (second["version"], second["thresholds"])
    assert first["training"]["to_ms"] == midnight("2018-06-15")


@pytest.mark.parametrize(
    ("frame", "arguments", "message"),
    [
        ({"leak": True}, [], "a label has leaked"),
        ({"days": 20}, [], "at least 21 days"),
        ({}, ["--train-to", "2018-05-01"], "no fraud to learn from"),
        ({}, ["--labels", "nowhere.parquet"], "cannot read nowhere.parquet"),
    ],
)
def test_what_cannot_be_trusted_is_not_packaged(
    tmp_path, capsys, frame: dict, arguments: list[str], message: str
) -> None:
    assert train.main([*write_frame(tmp_path, **frame), *arguments]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "package").exists()


def test_an_unfaithful_export_is_not_packaged(tmp_path, capsys, monkeypatch) -> None:
    honest = export.parity
    monkeypatch.setattr(export, "parity", lambda *given: honest(*given) + 1e-5)
    assert train.main(write_frame(tmp_path)) == 1
    assert "ONNX and scikit-learn differ" in capsys.readouterr().err
    assert not (tmp_path / "package").exists()


def test_frames_that_do_not_fit_their_labels_are_refused(tmp_path) -> None:
    write_frame(tmp_path)
    features, labels = tmp_path / "features.parquet", tmp_path / "transactions.parquet"
    pq.write_table(pq.read_table(labels)[5:], tmp_path / "fewer.parquet")
    with pytest.raises(train.TrainingError, match=r"5 transactions .* no label"):
        train.load(features, tmp_path / "fewer.parquet", FRAUD.names)
    with pytest.raises(train.TrainingError, match="has no column colour"):
        train.load(features, labels, [*FRAUD.names, "colour"])
    table = pq.read_table(features)
    broken = table.set_column(3, table.column_names[3], pa.array([np.nan] * len(table)))
    pq.write_table(broken, features)
    with pytest.raises(train.TrainingError, match="not finite"):
        train.load(features, labels, FRAUD.names)


def test_poor_results_on_the_handbooks_weeks_are_refused() -> None:
    train.check(evaluation())
    for change in ({"ap": 0.27}, {"auc": 0.86}, {"cp100": 0.29}, {"ap": 0.76}):
        with pytest.raises(train.TrainingError):
            train.check(evaluation(**change))
    train.check(evaluation(protocol="last 2 weeks", ap=0.27))


def test_untouched_weeks_neither_pass_nor_refuse_a_model() -> None:
    judged = evaluation(ap=0.9).folds
    train.check(dataclasses.replace(evaluation(), held_out=judged))
    with pytest.raises(train.TrainingError, match="below target"):
        train.check(dataclasses.replace(evaluation(ap=0.6), held_out=evaluation().folds))


# What is reported


@pytest.fixture(scope="module")
def year() -> Labelled:
    """Return a transaction an hour, of another card each, over all of the handbook's days."""
    time = np.arange(midnight("2018-04-01"), midnight("2018-10-01"), 3_600_000)
    card = np.array([f"C{i:04}" for i in range(len(time))])
    return Labelled(time, card, np.arange(len(time)) % 5 == 0)


def test_held_out_weeks_lie_after_every_week_that_decided(year) -> None:
    _, deciding = metrics.folds(year, train_days=28)
    reporting = metrics.held_out(year, train_days=28)
    assert [fold.test.min() for fold in reporting] == [
        np.searchsorted(year.time, midnight(day))
        for day in ("2018-09-05", "2018-09-12", "2018-09-19")
    ]
    assert max(fold.test.max() for fold in deciding) < min(fold.test.min() for fold in reporting)
    for fold in reporting:  # a week of delay between training and test, as everywhere
        assert year.time[fold.train].max() < year.time[fold.test].min() - 7 * DAY
    assert metrics.held_out(year.take(year.between(0, midnight("2018-09-25")))) == []


def frame_of(count: int, profiles: int) -> train.Frame:
    """Return a frame whose last profile tells the label, and whose features do not."""
    rng = np.random.default_rng(6)
    fraud = rng.random(count) < 0.1
    known = rng.random((count, profiles)).astype(np.float32)
    known[:, -1:] = fraud[:, None]
    time = np.sort(rng.integers(midnight("2018-06-01"), midnight("2018-06-29"), count))
    card = np.array([f"C{c:04}" for c in rng.integers(0, 500, count)])
    rows = rng.random((count, 3)).astype(np.float32)
    names = [f"p__{i}" for i in range(profiles)]
    return train.Frame(["a", "b", "c"], rows, Labelled(time, card, fraud), names, known)


def test_only_the_candidate_with_profiles_sees_them() -> None:
    frame = frame_of(4000, profiles=2)
    at = np.array([5, 1])
    assert frame.inputs(train.SHIPPED, at).tolist() == frame.rows[at].tolist()
    assert frame.inputs(train.WITH_PROFILES, at)[:, 3:].tolist() == frame.profiles[at].tolist()
    without, within = (
        train.evaluate(frame, one, cost=one.profiles)
        for one in (train.SHIPPED, train.WITH_PROFILES)
    )
    assert without.folds.mean["ap"] < 0.3
    assert within.folds.mean["ap"] > 0.95
    assert within.cost is not None
    assert within.cost.parity < 1e-5


@pytest.mark.parametrize(
    ("gain", "verdict"),
    [
        ({"ap": 0.02}, "should take them in"),
        ({"ap": 0.005}, "does not use the profiles"),
        ({"ap": 0.02, "cp100": -0.001}, "does not use the profiles"),
        ({"ap": -0.02}, "does not use the profiles"),
    ],
)
def test_the_verdict_on_profiles_follows_from_their_line(gain: dict, verdict: str) -> None:
    base = evaluation()
    mean = {key: value + gain.get(key, 0.0) for key, value in base.folds.mean.items()}
    other = dataclasses.replace(
        base,
        candidate=train.WITH_PROFILES,
        folds=dataclasses.replace(base.folds, mean=mean),
    )
    limits = package.Thresholds(0.2, 0.9, "by hand")
    text = train.markdown(frame_of(10, profiles=2), [other, base], limits)
    assert verdict in text
    assert f"{gain['ap']:+.3f} in AP" in text
    assert "profiles" not in train.markdown(frame_of(10, profiles=0), [base], limits)


def test_thresholds_are_tried_on_the_untouched_weeks() -> None:
    data = Labelled(
        midnight("2018-09-05") + np.array([0, 1, 2, DAY]),
        np.array(["C0", "C0", "C1", "C1"]),
        np.array([True, False, True, False]),
    )
    frame = dataclasses.replace(frame_of(4, profiles=0), data=data)
    held_out = train.Judged(GOOD, [GOOD], np.arange(4), np.array([0.95, 0.5, 0.1, 0.92]))
    text = train.markdown(
        frame,
        [dataclasses.replace(evaluation(), held_out=held_out)],
        package.Thresholds(0.2, 0.9, "by hand"),
    )
    assert "1 test weeks from 2018-09-05 until 2018-09-06" in text
    assert "sent 1 cards a day" in text  # C0 on the first day, C1 on the second
    assert "50% of the frauds flagged" in text
    assert "50% of the blocked transactions were frauds" in text


def test_profile_columns_are_read_without_their_ages(tmp_path) -> None:
    write_frame(tmp_path)
    features, labels = tmp_path / "features.parquet", tmp_path / "transactions.parquet"
    table = pq.read_table(features)
    unknown = np.where(np.arange(len(table)) % 3 == 0, np.nan, 7.0)
    for name in ("card_profile__mean", "card_profile__age_ms"):
        table = table.append_column(name, pa.array(unknown))
    pq.write_table(table, features)
    frame = train.load(features, labels, FRAUD.names, profiles=True)
    assert frame.profile_names == ["card_profile__mean"]
    assert set(frame.profiles.ravel().tolist()) == {train.UNKNOWN, 7.0}
    assert frame.names == list(FRAUD.names)
    assert train.load(features, labels, FRAUD.names).profiles.shape == (len(table), 0)


def test_the_table_fits_a_terminal_of_80_columns(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    longest = max((one.name for one in train.CANDIDATES), key=len)
    monkeypatch.setattr(train, "SHIPPED", dataclasses.replace(train.SHIPPED, name=longest))
    assert train.main(write_frame(tmp_path)) == 0
    heading, line, *_ = capsys.readouterr().out.splitlines()
    assert heading.split() == " ".join(train.ON_SCREEN).split()
    assert line.startswith(longest)
    assert line.split()[-1].replace(".", "").isdigit()


def test_threads_do_not_change_a_forest(labelled) -> None:
    rows, fraud = labelled
    forests = [train.SHIPPED.make().set_params(n_jobs=jobs).fit(rows, fraud) for jobs in (1, 2)]
    first, second = (export.to_onnx(forest, 4) for forest in forests)
    assert first == second


def test_one_row_is_one_answer(labelled, forest) -> None:
    predict = session(export.to_onnx(forest, 4), 4)
    assert predict(labelled[0][:1]).shape == (1,)
