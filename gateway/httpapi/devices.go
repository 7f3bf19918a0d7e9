package httpapi

import (
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"time"

	"holdfast/devices"
)

// shown is d as it is answered: no list is null.
func shown(d devices.Device) devices.Device {
	if d.Credentials == nil {
		d.Credentials = []devices.Credential{}
	}
	return d
}

func (s *Server) listDevices(c *call) (err error) {
	f := devices.DeviceFilter{
		After: c.query.Get("after"), Search: c.query.Get("search"), Role: c.query.Get("role"), Label: c.query.Get("label"),
	}
	if f.Limit, err = c.limit(); err != nil {
		return err
	}
	if f.Connected, err = c.boolean("connected"); err != nil {
		return err
	}
	if f.Enabled, err = c.boolean("enabled"); err != nil {
		return err
	}
	list, next, err := s.p.Devices.List(f)
	if err != nil {
		return err
	}
	page := DevicePage{Devices: make([]devices.Device, len(list)), Next: next}
	for i, d := range list {
		page.Devices[i] = shown(d)
	}
	return c.reply(http.StatusOK, page)
}

func (s *Server) addDevice(c *call) error {
	var b NewDevice
	if err := c.decode(&b); err != nil {
		return err
	}
	c.object = b.ID
	d := devices.NewDevice{ID: b.ID, Name: b.Name, Labels: b.Labels, Role: b.Role, Disabled: b.Enabled != nil && !*b.Enabled}
	switch cred := b.Credential; {
	case cred == nil:
	case cred.RetireOthers != "":
		return failf(codeInvalidDevice, "credential.retire_others: a new device has no others: leave it out")
	case cred.Kind == "none":
		if *cred != (NewCredential{Kind: "none"}) {
			return failf(codeInvalidDevice, "credential: of kind none takes nothing else")
		}
		d.NoCredential = true
	default:
		made, err := cred.parse("credential.")
		if err != nil {
			return err
		}
		d.Credential = &made
	}
	c.detail = b.Role
	dev, secret, err := s.p.Devices.Add(c.r.Context(), d)
	if err != nil {
		return err
	}
	c.w.Header().Set("Location", "/api/v1/devices/"+url.PathEscape(dev.ID))
	return c.reply(http.StatusCreated, DeviceMade{Device: shown(dev), Secret: secret})
}

// parse checks what is not the registry's to check. prefix is the path to b in the body.
func (b *NewCredential) parse(prefix string) (c devices.NewCredential, err error) {
	c = devices.NewCredential{Kind: b.Kind, Password: b.Password, Fingerprint: b.Fingerprint, RetireOthers: -1}
	switch b.Kind {
	case "":
		c.Kind = devices.CredentialToken
	case devices.CredentialToken, devices.CredentialPassword, devices.CredentialCertificate:
	default:
		return c, failf(codeInvalidDevice, "%skind is %.64q: it may be token, password or certificate", prefix, b.Kind)
	}
	switch {
	case c.Kind != devices.CredentialPassword && b.Password != "":
		return c, failf(codeInvalidDevice, "%spassword: only one of kind password has it; for kind %s leave it out", prefix, c.Kind)
	case c.Kind != devices.CredentialCertificate && b.Fingerprint != "":
		return c, failf(codeInvalidDevice, "%sfingerprint: only one of kind certificate has it; for kind %s leave it out", prefix, c.Kind)
	}
	if c.Lifetime, err = lifetime(codeInvalidDevice, prefix+"lifetime", b.Lifetime); err != nil {
		return c, err
	}
	if b.RetireOthers != "" {
		if c.RetireOthers, err = time.ParseDuration(b.RetireOthers); err != nil || c.RetireOthers < 0 {
			return c, failf(codeInvalidDevice, `%sretire_others is %.64q: it has to be a duration such as "24h", or "0s" for at once`, prefix, b.RetireOthers)
		}
	}
	return c, nil
}

// lifetime reads a duration that is more than nothing; "" is 0, for ever.
func lifetime(code, name, v string) (time.Duration, error) {
	if v == "" {
		return 0, nil
	}
	d, err := time.ParseDuration(v)
	if err != nil || d <= 0 {
		return 0, failf(code, `%s is %.64q: it has to be a duration such as "720h"; leave it out for ever`, name, v)
	}
	return d, nil
}

func (s *Server) getDevice(c *call) error {
	d, err := s.p.Devices.Get(c.path("id"))
	if err != nil {
		return err
	}
	return c.reply(http.StatusOK, shown(d))
}

func (s *Server) changeDevice(c *call) error {
	var b DevicePatch
	if err := c.decode(&b); err != nil {
		return err
	}
	switch {
	case b.Name == nil && b.Labels == nil && b.Enabled == nil && b.Role == nil:
		return failf(codeBadBody, "body changes nothing: give name, labels, enabled or role")
	case c.role < Admin && (b.Name != nil || b.Labels != nil || b.Role != nil):
		c.w.Header().Set("WWW-Authenticate", `Bearer error="insufficient_scope"`)
		return failf(codeForbidden, "name, labels and role need a token with role admin; %q is %s and may change enabled", c.who, c.role)
	}
	c.detail = b.summary()
	d, err := s.p.Devices.Patch(c.r.Context(), c.path("id"), devices.DevicePatch(b))
	if err != nil {
		return err
	}
	return c.reply(http.StatusOK, shown(d))
}

// summary names what is changed, for the audit log.
func (p *DevicePatch) summary() string {
	var parts []string
	if p.Enabled != nil {
		parts = append(parts, fmt.Sprintf("enabled %t", *p.Enabled))
	}
	if p.Role != nil {
		parts = append(parts, "role "+*p.Role)
	}
	if p.Name != nil {
		parts = append(parts, "name")
	}
	if p.Labels != nil {
		parts = append(parts, "labels")
	}
	return strings.Join(parts, ", ")
}

func (s *Server) removeDevice(c *call) error {
	if err := s.p.Devices.Remove(c.r.Context(), c.path("id")); err != nil {
		return err
	}
	c.w.WriteHeader(http.StatusNoContent)
	return nil
}

func (s *Server) addCredential(c *call) error {
	var b NewCredential
	if err := c.decode(&b); err != nil {
		return err
	}
	c.detail = b.Kind
	cred, err := b.parse("")
	if err != nil {
		return err
	}
	made, secret, err := s.p.Devices.AddCredential(c.r.Context(), c.path("id"), cred)
	if err != nil {
		return err
	}
	c.object += "/" + made.ID
	return c.reply(http.StatusCreated, CredentialMade{Credential: made, Secret: secret})
}

func (s *Server) removeCredential(c *call) error {
	if err := s.p.Devices.RemoveCredential(c.r.Context(), c.path("id"), c.path("credential")); err != nil {
		return err
	}
	c.w.WriteHeader(http.StatusNoContent)
	return nil
}
