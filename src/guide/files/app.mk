################################################################################
#
# app
#
################################################################################

APP_VERSION = 1.0
APP_SITE = https://example.org/download
APP_LICENSE = PROPRIETARY

define APP_INSTALL_INIT_SYSV
	$(INSTALL) -D -m 0755 $(@D)/init/S50app $(TARGET_DIR)/etc/init.d/S50app
endef

define APP_INSTALL_INIT_SYSTEMD
	$(INSTALL) -D -m 0644 $(@D)/init/app.service $(TARGET_DIR)/usr/lib/systemd/system/app.service
endef

# The user of app.service.
define APP_USERS
	app -1 app -1 * - - - app
endef

$(eval $(cargo-package))
