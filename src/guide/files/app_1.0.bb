SUMMARY = "A server with a pool of worker processes"
LICENSE = "CLOSED"

SRC_URI = "https://example.org/download/app-${PV}.tar.gz"
SRC_URI[sha256sum] = "0000000000000000000000000000000000000000000000000000000000000000"
# The crates of Cargo.lock. `bitbake -c update_crates app` writes this file.
require ${BPN}-crates.inc

inherit cargo cargo-update-recipe-crates update-rc.d systemd useradd

# systemd.bbclass removes the file that belongs to the other init system.
INITSCRIPT_NAME = "app"
SYSTEMD_SERVICE:${PN} = "app.service"
USERADD_PACKAGES = "${PN}"
USERADD_PARAM:${PN} = "--system --no-create-home --user-group app"

do_install:append() {
    install -D -m 0755 ${S}/init/S50app ${D}${sysconfdir}/init.d/app
    install -D -m 0644 ${S}/init/app.service ${D}${systemd_system_unitdir}/app.service
}
