// Before the first paint, so that no page flashes white: the theme that was chosen here last, else the system's.
"use strict";
try {
  const chosen = localStorage.getItem("mixwright-theme");
  if (chosen === "dark" || chosen === "light") document.documentElement.dataset.theme = chosen;
} catch {
  /* storage may be switched off; the system's theme it is */
}
