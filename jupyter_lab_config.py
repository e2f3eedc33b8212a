"""`make lab`: JupyterLab opens the first notebook, and opening a notebook changes no file."""


def forget_kernel(model: dict, **_) -> None:
    """A notebook is saved without the versions of the kernel that has opened it."""
    if model["type"] == "notebook":
        model["content"]["metadata"].pop("language_info", None)


c = get_config()  # noqa: F821 (Jupyter defines it)
c.LabApp.default_url = "/lab/tree/notebooks/00_start_here.ipynb"
c.ContentsManager.pre_save_hook = forget_kernel
