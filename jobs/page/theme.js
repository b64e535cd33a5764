"use strict";
// Light or dark as the system has it, or as the reader chose: before anything is painted. style.css follows data-theme.
(() => {
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const key = "stemline-theme";
  let chosen = null;
  try {
    chosen = localStorage.getItem(key);
  } catch {
    // A browser that keeps nothing for files: the system decides.
  }
  const apply = () => {
    root.dataset.theme = chosen ?? (system.matches ? "dark" : "light");
    document.querySelector(".theme")?.setAttribute("aria-pressed", String(root.dataset.theme === "dark"));
    dispatchEvent(new Event("themechange"));
  };
  apply();
  system.addEventListener("change", apply);
  addEventListener("DOMContentLoaded", () => {
    apply();
    document.querySelector(".theme").addEventListener("click", () => {
      const other = root.dataset.theme === "dark" ? "light" : "dark";
      chosen = other === (system.matches ? "dark" : "light") ? null : other;
      try {
        if (chosen) localStorage.setItem(key, chosen);
        else localStorage.removeItem(key);
      } catch {
        // As above: the choice holds for this view.
      }
      apply();
    });
  });
})();
