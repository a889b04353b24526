"""Why a job waits: Slurm's reasons (squeue(1), JOB REASON CODES) in words, with what to do."""

from __future__ import annotations

_WORDS = {
    "AssociationJobLimit": "the account's limit of jobs is reached; it starts when others end",
    "AssocGrp": "the account's share of the cluster is in use; it starts when others of the account end",
    "AssocMax": "it asks for more than the account may have at once: submit with fewer --nodes or a shorter --time",
    "BadConstraints": "no nodes have what it asks for: see --exclude, excluded nodes, `sbatch` of the site file",
    "BeginTime": "Slurm holds a requeued job back for a while; it starts by itself",
    "Dependency": "it waits for the end of the job before it",
    "DependencyNeverSatisfied": "the job that it waits for is gone: cancel it, then bifrost slurm resume",
    "InvalidAccount": "no such account, or not for this partition: give another --account",
    "InvalidQOS": "no such quality of service for the account: see `sbatch` of the site file",
    "JobArrayTaskLimit": "the elements of the array run one after the other",
    "JobHeldAdmin": "an administrator holds it: ask them",
    "JobHeldUser": "it is held: scontrol release and its job id",
    "JobHoldMaxRequeue": "Slurm requeued it too often and holds it: look at the log, then cancel and resume",
    "Licenses": "it waits for a licence",
    "MaxCpuPerAccount": "the account's limit of cores is reached; it starts when others end",
    "NodeDown": "a node that it needs is down: sinfo -R says why",
    "PartitionDown": "the partition is down: sinfo says which are up",
    "PartitionInactive": "the partition takes no jobs now: sinfo says which do",
    "PartitionNodeLimit": "the partition never gives so many nodes: cancel, then submit with fewer --nodes",
    "PartitionTimeLimit": "the partition never gives so much time: cancel, then submit with a shorter --time",
    "Priority": "others are first; squeue --start says when it may start",
    "QOSGrp": "the quality of service is in full use; it starts when others of it end",
    "QOSMax": "it asks for more than the quality of service allows: submit with fewer --nodes or a shorter --time",
    "QOSResourceLimit": "the quality of service is in full use; it starts when others of it end",
    "ReqNodeNotAvail": "nodes that it needs are reserved, down or drained: sinfo -R says why",
    "Reservation": "it waits for its reservation to begin",
    "Resources": "its nodes are in use; squeue --start says when it may start",
    "launch_failed_requeued_held": "its start failed: scontrol release and its job id, or exclude its node",
}


def explained(reason: str) -> str:
    """`reason` as Slurm writes it, with what it means where that is known: of several words the longest that begins
    it counts, since Slurm appends details (`ReqNodeNotAvail, UnavailableNodes:node2`, `QOSMaxNodePerUserLimit`)."""
    known = max((name for name in _WORDS if reason.startswith(name)), key=len, default=None)
    return f"{reason}: {_WORDS[known]}" if known else reason
