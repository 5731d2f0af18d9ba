"""Errors carry facts, can be pickled, and form one tree."""

import inspect
import pickle

import pytest

import nanobanana_async as nb
from nanobanana_async import errors

ALL = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, nb.NanoBananaError)]


@pytest.mark.parametrize("kind", ALL)
def test_every_error_survives_a_pickle_with_its_facts(kind: type[nb.NanoBananaError]) -> None:
    """Process pools and task queues pickle errors."""
    error = kind("what happened")
    error.task_id = "ta-1"
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 - pickled here
    assert (type(again), str(again), vars(again)) == (kind, "what happened", vars(error))


@pytest.mark.parametrize("kind", ALL)
def test_every_error_is_public_and_in_the_drawn_tree(kind: type[nb.NanoBananaError]) -> None:
    """The tree at the top of the module is complete."""
    assert kind.__name__ in nb.__all__
    assert kind.__name__ in (errors.__doc__ or "")


def test_an_error_about_a_task_takes_its_id_from_the_snapshot() -> None:
    """The caller can continue with `client.task(exc.task_id)`."""
    task = nb.Task(task_id="ta-1", status=nb.TaskStatus.FAILED)
    assert nb.TaskFailed("no", task=task).task_id == "ta-1"
