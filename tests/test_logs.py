import io
import logging

import pytest

from xc_ray.logs import log_to, telling

pytestmark = pytest.mark.usefixtures("root_logger_as_it_was")


def test_our_words_are_logged_and_others_from_a_warning_on() -> None:
    stream = io.StringIO()
    log_to(stream)
    logging.getLogger("xc_ray.train.loop").info("ours")
    logging.getLogger("xc_ray.train.loop").debug("ours, too fine")
    loud = logging.getLogger("/site-packages/library/context.py")  # some are named by their file
    loud.setLevel(logging.DEBUG)
    loud.info("chatter")
    loud.warning("trouble")
    logging.getLogger("xc_rayon").info("not ours")
    assert stream.getvalue() == "ours\ntrouble\n"


def test_what_was_set_up_before_is_replaced() -> None:
    before, after = io.StringIO(), io.StringIO()
    log_to(before)
    log_to(after)
    logging.getLogger("xc_ray").info("once")
    assert (before.getvalue(), after.getvalue()) == ("", "once\n")


def test_what_one_logger_says_is_told_once_and_nowhere_else() -> None:
    everything, told = io.StringIO(), io.StringIO()
    log_to(everything)
    logger = logging.getLogger("xc_ray.registry.client")
    with telling(logger.name, told):
        for what in ("one", "two", "one"):
            logger.info("of %s", what)
        logger.debug("too fine")
        logging.getLogger("xc_ray.registry.store").info("another")
    logger.info("after")
    assert told.getvalue() == "xc-ray: of one\nxc-ray: of two\n"
    assert everything.getvalue() == "another\nafter\n"
