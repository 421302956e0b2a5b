"""Clusters of Ray on this machine."""

import ray

_TRIES = 3


def start_cluster(*, cpus: int, **options: object) -> None:
    """Start a cluster of its own and connect to it; `ray.shutdown()` ends both.

    Ray waits half a minute for its own processes, which a busy machine can exceed, and no setting
    changes that. So it may try again.
    """
    for tries_left in reversed(range(_TRIES)):
        try:
            ray.init(
                "local",
                num_cpus=cpus,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
                **options,
            )
        except Exception:
            ray.shutdown()
            if not tries_left:
                raise
        else:
            return
