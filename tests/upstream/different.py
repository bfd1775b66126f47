"""Which of their tests are about what is different here by design, with threads, and why. Checked by hand.

The reasons are those of `docs/migrating.md`.
"""

from typing import Final

__all__ = ["DIFFERENT", "reason_of"]

PRIVATE: Final = "reads a private attribute, or the inner form of a state"
THREADS: Final = "is about worker processes: get_worker_info(), a copy of the dataset for each, crashes, exits"
ONCE: Final = "counts the samples of an IterableDataset once for each worker: here it is read once"
SPAWNED: Final = "runs torch's own loader, in another process"
NO_WARNING: Final = "expects a warning of more processes than cores"
BEGINNING: Final = "takes a state before the first batch of a dataset that does not begin anew: it holds nothing of it"
GLOBAL_RNG: Final = "draws samples from a global generator: no part of a state, see sample_rng()"
NEXT_EPOCH: Final = "resumes after the last batch in the epoch that is over: here the next one begins"
OWN_EPOCH: Final = "counts its epochs in the dataset: a state between two epochs holds nothing of it, but set_epoch"
ANY_WORKERS: Final = "expects another number of workers to be refused: any will do"

DIFFERENT: Final[dict[str, str]] = {
    # torch's
    "test_bulk_loading_nobatch": PRIVATE,
    "test_excessive_thread_creation_warning": NO_WARNING,
    "test_fd_limit_exceeded": SPAWNED,
    "test_get_worker_info": SPAWNED,
    "test_large_sampler_indices": SPAWNED,
    "test_early_exit": SPAWNED,
    "test_segfault": SPAWNED,
    "test_no_segfault": SPAWNED,
    "test_timeout": SPAWNED,
    "test_iterable_style_dataset": THREADS,
    "test_multi_epochs_reproducibility": THREADS,
    "test_multiprocessing_iterdatapipe": ONCE,
    "test_partial_workers": PRIVATE,
    "test_shuffler_iterdatapipe": PRIVATE,
    "test_dataset_not_reset": THREADS,
    "test_ind_worker_queue": THREADS,
    # torchdata's
    "test_random_state": GLOBAL_RNG,
    "TestSnapshotZero_shard2::test_iterable": BEGINNING,
    "TestSnapshotZero_shard2::test_map": GLOBAL_RNG,
    "TestSnapshotZero_shard2::test_map_iterrupted_shuffle": GLOBAL_RNG,
    "TestSnapshotEnd_shard2::test_iterable": GLOBAL_RNG,
    "TestSnapshotEnd_shard2::test_map": GLOBAL_RNG,
    "test_num_workers_mismatch": ANY_WORKERS,
    "TestInitialState_shard0": PRIVATE,
    "TestStatefulDataLoaderIterable2_shard0": BEGINNING,
    "TestDynamicStateIterableDataset_shard0": PRIVATE,
    "TestDatasetIteratorStateDuplication_shard0": PRIVATE,
    "TestEndOfEpochBehavior_shard0": NEXT_EPOCH,
    "TestMultiEpochState_shard0": OWN_EPOCH,
    "TestSingleIterCalled_shard0": PRIVATE,
    "test_out_of_order_iterable_ds_no_completed_workers": THREADS,
    "test_out_of_order_iterable_ds_one_completed_worker": THREADS,
}
"""By the names of tests, of classes, or of both."""


def reason_of(name: str) -> str | None:
    """Why a test, named `Class::test`, may fail; None: nothing is known of it."""
    group, _, test = name.partition("::")
    return DIFFERENT.get(name) or DIFFERENT.get(test) or DIFFERENT.get(group)
