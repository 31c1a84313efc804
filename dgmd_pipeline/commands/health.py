"""The command `health`."""

import dataclasses
import errno
import json
import logging
import os
from datetime import datetime
from typing import TYPE_CHECKING

from dgmd_pipeline import formatting
from dgmd_pipeline.commands import status
from dgmd_pipeline.tasks import lookup
from dgmd_pipeline.workflow import disk

if TYPE_CHECKING:
    from dgmd_pipeline.settings import Settings

log = logging.getLogger(__name__)


def health(values: "Settings", as_json: bool) -> int:
    """Show the outcome of the last run; return 0 if it succeeded or no run has ended yet, else 1.

    If the version that it registered has been deleted in the registry, say so.

    Raises PipelineError if DATA_DIR cannot be read or written.
    """
    with disk.disk_errors_explained(values.data_dir):
        last = status.last(values.data_dir, values.model_name)
        if not values.data_dir.is_dir():
            log.error("%s does not exist: no run has ended there.", values.data_dir)
            return 1
        if not os.access(values.data_dir, os.W_OK):  # the status may be outdated: a later run could not write its own
            reason = errno.EROFS if os.statvfs(values.data_dir).f_flag & os.ST_RDONLY else errno.EACCES
            raise OSError(reason, os.strerror(reason), str(values.data_dir))
    if last and last.version and (missing := lookup.missing_registration(values)):
        last = dataclasses.replace(last, message=f"{last.message.rstrip('.')}. Since then: {missing}")
    if as_json:
        print(json.dumps(last and dataclasses.asdict(last), indent=1))
    elif last is None:
        log.info("No run has ended yet in %s.", values.data_dir)
    else:
        ended = formatting.local_time(datetime.fromisoformat(last.ended))
        log.info("%s: %s after %.0f s. %s", ended, last.outcome, last.seconds, last.message)
    return 0 if last is None or last.is_good else 1
