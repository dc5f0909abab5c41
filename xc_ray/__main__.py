"""`python -m xc_ray` is `xc-ray`."""

from xc_ray.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
