"""What can go wrong on the way from an archive to a running application; the messages are for the application's owner.

PipelineError
  LostClaim           somebody else has the job
  CancelRequested     the deployment is to be cancelled by who works on it
  AppIsRemoved        the application is being removed
  NothingToRun        the application has no release, or does not exist
  DeploymentInProgress  the application has a deployment in progress: the text is its id
  ReleaseNotKept      there is no such release to go back to: the text is what was asked for
  ForbiddenChange     the table of states has no such change: a bug in the caller
  DeployFailed        it ends the deployment as failed, with this reason
    ArchiveRefused      the archive is damaged, too large, or tries something
    ArchivesUnavailable the store of archives cannot be reached
    NotDeployable       nothing in it says how to run it, or not on this runtime
    BuildFailed         a build step failed, or took too long
    StartFailed         it was built, but does not answer
  EngineUnavailable   the container engine cannot be reached: to be tried again, not the owner's fault
"""


class PipelineError(Exception):
    """Anything this package raises on purpose."""


class LostClaim(PipelineError):
    """The claim's lease ran out and somebody else has the job, or it was ended: stop, and write nothing more."""


class CancelRequested(PipelineError):
    """Somebody asked to cancel the deployment: end all that runs for it, then say `cancelled`."""


class AppIsRemoved(PipelineError):
    """Nothing new is begun for an application that is being removed."""


class NothingToRun(PipelineError):
    """Nothing of the application ever served."""


class DeploymentInProgress(PipelineError):
    """Going back would be undone when that one is done."""


class ReleaseNotKept(PipelineError):
    """Only the last healthy releases are kept."""


class ForbiddenChange(PipelineError):
    """The deployment's state does not allow this change."""


class DeployFailed(PipelineError):
    """The deployment fails for this reason."""


class ArchiveRefused(DeployFailed):
    """The archive is not what a workspace may send."""


class ArchivesUnavailable(DeployFailed):
    """The store of archives cannot be reached; deploying again may work."""


class NotDeployable(DeployFailed):
    """Nothing in the files says how to run them, or this runtime cannot."""


class BuildFailed(DeployFailed):
    """A build step failed; its output is in the build log."""


class StartFailed(DeployFailed):
    """The application does not answer; its output is in the release's log."""


class EngineUnavailable(PipelineError):
    """The container engine cannot be reached."""
