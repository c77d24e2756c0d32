"""The training loop: that it learns, stops, keeps the best, and resumes to the same bits."""

import dataclasses
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pennyweight.core.errors import ConfigError, DataError
from pennyweight.data.dataset import Dataset
from pennyweight.data.schema import Column, Schema
from pennyweight.model import metrics, train
from pennyweight.model.ranking import DNN
from pennyweight.model.retrieval import MatrixFactorization
from pennyweight.model.train import EpochLog, Progress, Queries, Recipe, fit, scores

COLUMNS = (
    Column("user", "user", "categorical", 30),
    Column("item", "item", "categorical", 40),
    Column("hour", "context", "numeric"),
    Column("label", "label", "numeric"),
)


def rows(seed: int = 0, n: int = 3000) -> Dataset:
    """Clicks that depend on planted groups of users and items, and on the hour."""
    rng = np.random.default_rng(seed)
    taste = np.random.default_rng(99)
    users, items = taste.choice([-1, 1], 30), taste.choice([-1, 1], 40)
    u, i, hour = rng.integers(2, 30, n), rng.integers(2, 40, n), rng.normal(size=n)
    logit = users[u] * items[i] + users[u] + items[i] + hour
    label = rng.random(n) < 1 / (1 + np.exp(-logit))
    columns = {"user": u, "item": i, "hour": hour.astype(np.float32), "label": label.astype(np.float32)}
    return Dataset.from_arrays(columns, Schema(COLUMNS))


def dnn(seed: int = 0, dropout: float = 0.2) -> nn.Module:
    torch.manual_seed(seed)
    return DNN(COLUMNS, dim=4, hidden=(16,), dropout=dropout)


RECIPE = Recipe(batch=256, epochs=6, lr=0.03, patience=6, embedding_l2=1e-4, weight_decay=1e-5)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_it_learns_and_ends_with_the_best_weights_in_evaluation_mode() -> None:
    module, valid = dnn(), rows(1)
    done = fit(module, rows(), valid, RECIPE)
    assert done.metric > 0.8 and not module.training
    assert done.metric == max(e.metric for e in done.history) == done.history[done.best_epoch - 1].metric
    assert metrics.auc(valid.column("label"), scores(module, valid)) == done.metric


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "adagrad", "sgd"])
def test_same_seed_same_bits_and_the_callers_random_state_is_left_alone(optimizer: str) -> None:
    recipe = dataclasses.replace(RECIPE, optimizer=optimizer, epochs=2)
    one, two, other = dnn(), dnn(), dnn()
    before = torch.get_rng_state()
    fit(one, rows(), rows(1), recipe, seed=3)
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(5)
    fit(two, rows(), rows(1), recipe, seed=3)
    fit(other, rows(), rows(1), recipe, seed=4)
    assert same(one, two) and not same(one, other)


class Stop:
    """A progress callback that presses Ctrl-C at a step of an epoch."""

    def __init__(self, epoch: int, step: int) -> None:
        self.at = (epoch, step)

    def __call__(self, where: Progress | EpochLog) -> None:
        if isinstance(where, Progress) and (where.epoch, where.step) == self.at:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "adagrad", "sgd"])
@pytest.mark.parametrize("at", [(1, 3), (3, 12), (6, 5)], ids=["first epoch", "epoch end", "last epoch"])
def test_interrupted_and_resumed_is_bit_for_bit_the_uninterrupted_run(
    at: tuple[int, int], optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "TICK_S", 0.0)
    recipe = dataclasses.replace(RECIPE, optimizer=optimizer)
    whole, parts, file = dnn(), dnn(), tmp_path / "training.safetensors"
    expected = fit(whole, rows(), rows(1), recipe, seed=5)
    cut = fit(parts, rows(), rows(1), recipe, seed=5, checkpoint=file, progress=Stop(*at))
    assert cut.stopped == "interrupted"
    fresh = dnn(seed=77)
    done = fit(fresh, rows(), rows(1), recipe, seed=5, checkpoint=file)
    assert same(whole, fresh)
    assert [(e.epoch, e.loss, e.metric) for e in done.history] == [(e.epoch, e.loss, e.metric) for e in expected.history]
    assert (done.best_epoch, done.stopped) == (expected.best_epoch, expected.stopped)
    again = dnn(seed=78)
    assert fit(again, rows(), rows(1), recipe, seed=5, checkpoint=file).history == done.history and same(again, whole)


def test_pair_losses_resume_exactly_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "TICK_S", 0.0)
    recipe = Recipe(loss="bpr", metric="ndcg@10", batch=128, epochs=3, lr=0.01)
    torch.manual_seed(0)
    whole, fresh = MatrixFactorization(COLUMNS, 8), MatrixFactorization(COLUMNS, 8)
    parts = MatrixFactorization(COLUMNS, 8)
    parts.load_state_dict(whole.state_dict())
    fit(whole, rows(), rows(1), recipe, seed=2)
    fit(parts, rows(), rows(1), recipe, seed=2, checkpoint=tmp_path / "c", progress=Stop(2, 4))
    fit(fresh, rows(), rows(1), recipe, seed=2, checkpoint=tmp_path / "c")
    assert same(whole, fresh)


def test_a_checkpoint_of_another_training_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "c"
    fit(dnn(), rows(), rows(1), dataclasses.replace(RECIPE, epochs=1), checkpoint=file)
    with pytest.raises(ConfigError, match="another training"):
        fit(dnn(), rows(), rows(1), RECIPE, checkpoint=file)
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(ConfigError, match="cannot be read"):
        fit(dnn(), rows(), rows(1), dataclasses.replace(RECIPE, epochs=1), checkpoint=file)


def test_ctrl_c_keeps_the_best_so_far_and_the_handler_that_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "TICK_S", 0.0)
    before = signal.getsignal(signal.SIGINT)
    module, valid = dnn(), rows(1)
    done = fit(module, rows(), valid, RECIPE, progress=Stop(1, 6))
    assert done.stopped == "interrupted" and done.metric > 0.5
    assert metrics.auc(valid.column("label"), scores(module, valid)) == done.metric
    assert signal.getsignal(signal.SIGINT) is before


def test_a_deadline_in_the_past_gives_back_the_weights_as_given_or_better() -> None:
    module, valid = dnn(), rows(1)
    start = metrics.auc(valid.column("label"), scores(module, valid))
    done = fit(module, rows(), valid, RECIPE, deadline_s=0.0)
    assert done.stopped == "deadline" and done.metric >= start and len(done.history) == 1


def test_fine_tuning_that_only_harms_gives_back_what_it_was_given() -> None:
    module = dnn()
    fit(module, rows(), rows(1), RECIPE)
    good = {k: v.clone() for k, v in module.state_dict().items()}
    done = fit(module, rows(), rows(1), dataclasses.replace(RECIPE, lr=3.0, optimizer="sgd", clip=100.0, epochs=2))
    assert done.best_epoch == 0
    assert all(torch.equal(good[k], v) for k, v in module.state_dict().items())


def test_patience_and_decay() -> None:
    recipe = dataclasses.replace(RECIPE, lr=0.05, epochs=50, patience=2)
    done = fit(dnn(), rows(), rows(1), recipe)
    assert done.stopped == "patience" and len(done.history) == done.best_epoch + 2


def test_a_loss_that_is_no_number_is_an_error_and_the_best_weights_stay() -> None:
    module = dnn()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    with pytest.raises(
        DataError, match=r"loss became (nan|inf) in epoch 1 by step \d+ of 12; lower the learning rate \(now 1e\+30\)"
    ):
        fit(module, rows(), rows(1), dataclasses.replace(RECIPE, lr=1e30, optimizer="sgd"))
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())


def test_embedding_l2_is_half_the_squares_of_all_tables_in_the_loss() -> None:
    plain, decayed = dnn(dropout=0.0), dnn(dropout=0.0)
    recipe = dataclasses.replace(RECIPE, optimizer="sgd", embedding_l2=0.0, weight_decay=0.0)
    batch = next(rows().batches(64))
    for module, l2 in ((plain, 0.0), (decayed, 0.3)):
        optimizer = train.optimizer(module, dataclasses.replace(recipe, embedding_l2=l2))
        loss = nn.functional.binary_cross_entropy_with_logits(module(batch), batch["label"])
        if module is plain:
            loss = loss + 0.3 / 2 * sum(t.weight.square().sum() for t in module.embeddings.tables.values())
        loss.backward()
        optimizer.step()
    for a, b in zip(plain.parameters(), decayed.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-7)


def test_distillation_follows_the_teacher_and_the_cache_equals_asking_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, data, valid = dnn(), rows(), rows(1)
    fit(teacher, data, valid, RECIPE)
    recipe = dataclasses.replace(RECIPE, distill_alpha=1.0, temperature=2.0, epochs=4)
    cached, asked, alone = dnn(9), dnn(9), dnn(9)
    fit(cached, data.take(np.arange(0, 3000, 2)), valid, recipe, teacher=teacher)
    fit(alone, data.take(np.arange(0, 3000, 2)), valid, recipe)
    monkeypatch.setattr(train, "TEACHER_BYTES", 0)
    fit(asked, data.take(np.arange(0, 3000, 2)), valid, recipe, teacher=teacher)
    told = scores(teacher, valid)
    assert np.allclose(scores(cached, valid), scores(asked, valid), atol=1e-3)
    assert np.corrcoef(scores(cached, valid), told)[0, 1] > np.corrcoef(scores(alone, valid), told)[0, 1]


def test_classes_and_numbers_are_learned_too() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(600, 4)).astype(np.float32)
    feature = Column("x", "context", "numeric", length=4)
    classes = Schema((feature, Column("label", "label", "numeric", size=3)))
    data = Dataset.from_arrays({"x": x, "label": x[:, :3].argmax(1)}, classes)
    recipe = Recipe(loss="cross-entropy", metric="accuracy", lr=0.02, batch=64, epochs=20)
    teacher = nn.Linear(4, 3)
    assert fit(teacher, data, data, recipe, inputs=("x",)).metric > 0.95
    student = nn.Linear(4, 3)
    assert fit(student, data, data, recipe, inputs=("x",), teacher=teacher).metric > 0.95
    numbers = Schema((feature, Column("label", "label", "numeric")))
    data = Dataset.from_arrays({"x": x, "label": x.sum(1)}, numbers)
    line = nn.Linear(4, 1)
    assert fit(line, data, data, dataclasses.replace(recipe, loss="mse", metric="rmse"), inputs=("x",)).metric < 0.1
    blended = dataclasses.replace(recipe, loss="mse", metric="rmse", mixup=0.4)
    assert fit(nn.Linear(4, 1), data, data, blended, inputs=("x",)).metric < 0.1
    assert scores(line, data, inputs=("x",), batch=100).shape == (600,)


@pytest.mark.parametrize("loss", ["cross-entropy", "bce"])
def test_blended_rows_teach_more_than_a_few_rows_can(loss: str) -> None:
    """Forty rows, and a teacher who knows: what is asked about their blends holds on rows neither has seen."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2000, 6)).astype(np.float32)
    size = 3 if loss == "cross-entropy" else 0
    schema = Schema((Column("x", "context", "numeric", length=6), Column("label", "label", "numeric", size=size)))
    y = x[:, :3].argmax(1) if size else x[:, 0] > 0
    data = Dataset.from_arrays({"x": x, "label": y.astype(np.float32 if not size else np.int64)}, schema)
    few, check, unseen = data.take(np.arange(40)), data.take(np.arange(500, 1000)), data.take(np.arange(1000, 2000))

    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, max(1, size)))

    recipe = Recipe(loss=loss, metric="log_loss", lr=0.01, batch=20, epochs=200, patience=200, distill_alpha=1.0)
    teacher, plain, blended, alone = net(), net(), net(), net()
    fit(teacher, data, unseen, dataclasses.replace(recipe, batch=200, epochs=60), inputs=("x",))
    for student, mixup, told in ((plain, 0.0, teacher), (blended, 1.0, teacher), (alone, 1.0, None)):
        fit(student, few, check, dataclasses.replace(recipe, mixup=mixup), inputs=("x",), teacher=told)
    said = [torch.from_numpy(scores(m, unseen, inputs=("x",))) for m in (teacher, plain, blended, alone)]
    wanted, *found = [s.softmax(1) if size else s.sigmoid() for s in said]
    apart = [float((f - wanted).abs().mean()) for f in found]
    assert apart[1] < 0.9 * apart[0], "the teacher is asked about the blends"
    assert apart[1] < apart[2], "and is heard"


def test_ids_cannot_be_blended() -> None:
    with pytest.raises(ConfigError, match=r"mixup blends numbers, and .* holds ids"):
        fit(dnn(), rows(), rows(1), dataclasses.replace(RECIPE, mixup=0.4))


def test_one_row_left_over_does_not_stop_batch_norm() -> None:
    assert fit(dnn(), rows(n=513), rows(1), dataclasses.replace(RECIPE, epochs=1)).history


def test_progress_says_where_training_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "TICK_S", 0.0)
    heard: list[Progress | EpochLog] = []
    done = fit(dnn(), rows(), rows(1), dataclasses.replace(RECIPE, epochs=2), progress=heard.append)
    assert tuple(p for p in heard if isinstance(p, EpochLog)) == done.history
    said = [p for p in heard if isinstance(p, Progress)]
    assert [(p.epoch, p.step) for p in said] == [(e, s) for e in (1, 2) for s in range(1, 13)]
    assert all(p.rows_per_s > 0 and p.eta_s >= 0 for p in said) and said[-1].loss < said[0].loss


def test_bpr_ranks_what_users_like_and_popularity_is_beaten() -> None:
    rng = np.random.default_rng(0)
    u, i = rng.integers(2, 30, 1500), rng.integers(2, 40, 1500)
    liked = {"user": u, "item": i, "hour": np.zeros(1500, np.float32), "label": ((u + i) % 3 == 0).astype(np.float32)}
    data, valid, _ = Dataset.from_arrays(liked, Schema(COLUMNS)).split("random", (0.4, 0.3, 0.3))
    torch.manual_seed(0)
    module = MatrixFactorization(COLUMNS, 8)
    done = fit(module, data, valid, Recipe(loss="bpr", metric="ndcg@10", batch=256, lr=0.02, epochs=30, lr_decay=1.0))
    asked = Queries.of(valid, [data])
    counts = torch.from_numpy(np.bincount(data.column("item")[data.column("label") > 0], minlength=40)).float()

    class Popularity(nn.Module):
        def user_vectors(self, batch: dict[str, Tensor]) -> Tensor:
            return torch.ones(len(batch["user"]), 1)

        def item_vectors(self, batch: dict[str, Tensor]) -> Tensor:
            return counts[batch["item"]].unsqueeze(1)

    assert done.metric == asked.rank(module, 10).ndcg > 1.3 * asked.rank(Popularity(), 10).ndcg


def test_queries_leave_out_what_was_seen_and_keep_what_is_to_be_found() -> None:
    schema = Schema((COLUMNS[0], COLUMNS[1], COLUMNS[3]))

    def data(users: list[int], items: list[int], labels: list[int]) -> Dataset:
        return Dataset.from_arrays({"user": users, "item": items, "label": labels}, schema)

    asked = Queries.of(data([5, 5, 7, 8], [10, 11, 10, 12], [1, 1, 1, 0]), [data([5, 7, 9], [10, 20, 3], [1, 0, 1])])
    assert asked.rows.column("user").tolist() == [5, 7]
    assert [asked.truth.cut(i, i + 1).items.tolist() for i in (0, 1)] == [[10, 11], [10]]
    assert [asked.seen.cut(i, i + 1).items.tolist() for i in (0, 1)] == [[10], [20]]


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("lr", 0.0, "above 0"),
        ("batch", 0, "at least 1"),
        ("metric", "auk", "unknown metric"),
        ("distill_alpha", 2.0, "between"),
        ("clip", -1.0, "negative"),
        ("mixup", -0.1, "negative"),
    ],
)
def test_an_impossible_recipe_is_refused(field: str, value: object, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Recipe(**{field: value})  # type: ignore[arg-type]


def test_a_recipe_that_does_not_fit_the_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="'bpr' needs a model with user_vectors"):
        fit(dnn(), rows(), rows(1), Recipe(loss="bpr"))
    with pytest.raises(ConfigError, match="DNN cannot rank a catalogue"):
        fit(dnn(), rows(), rows(1), Recipe(metric="ndcg@10"))
    with pytest.raises(ConfigError, match="no parameter that can be trained"):
        fit(dnn().requires_grad_(False), rows(), rows(1), RECIPE)


def test_another_metric_may_select_the_epoch() -> None:
    valid = rows(1)
    shown = fit(dnn(), rows(), valid, dataclasses.replace(RECIPE, metric="accuracy", select="log_loss", lr_decay=1.0))
    alone = fit(dnn(), rows(), valid, dataclasses.replace(RECIPE, metric="log_loss", lr_decay=1.0))
    assert shown.best_epoch == alone.best_epoch
    assert [e.metric for e in shown.history] != [e.metric for e in alone.history]
    assert shown.metric == shown.history[shown.best_epoch - 1].metric > 0.7
    with pytest.raises(ConfigError, match="unknown metric 'sharpness'"):
        Recipe(select="sharpness")
