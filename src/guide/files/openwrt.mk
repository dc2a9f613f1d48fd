include $(TOPDIR)/rules.mk

PKG_NAME:=app
PKG_VERSION:=1.0
PKG_RELEASE:=1

PKG_SOURCE:=$(PKG_NAME)-$(PKG_VERSION).tar.gz
PKG_SOURCE_URL:=https://example.org/download
# Replace it with the SHA-256 sum of the archive.
PKG_HASH:=skip

PKG_BUILD_DEPENDS:=rust/host
PKG_BUILD_PARALLEL:=1
PKG_BUILD_FLAGS:=no-mips16

include $(INCLUDE_DIR)/package.mk
include $(TOPDIR)/feeds/packages/lang/rust/rust-package.mk

define Package/app
  SECTION:=net
  CATEGORY:=Network
  TITLE:=A server with a pool of worker processes
  DEPENDS:=$(RUST_ARCH_DEPENDS)
  # The user of the init script.
  USERID:=app=990:app=990
endef

define Package/app/install
	$(INSTALL_DIR) $(1)/usr/bin $(1)/etc/init.d
	$(INSTALL_BIN) $(PKG_INSTALL_DIR)/bin/app $(1)/usr/bin/app
	$(INSTALL_BIN) $(PKG_BUILD_DIR)/init/app.procd $(1)/etc/init.d/app
endef

$(eval $(call BuildPackage,app))
