// Not a module: it runs before the first paint, so that a page in the other theme never flashes.
{
  const kept = localStorage.getItem("lamamba-theme");
  if (kept) document.documentElement.dataset.theme = kept;
}
