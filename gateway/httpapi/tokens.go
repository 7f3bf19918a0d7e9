package httpapi

import (
	"net/http"
	"regexp"
)

// tokenName is what fits into a path and a line of the log.
var tokenName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$`)

func (s *Server) listTokens(c *call) error {
	l := TokenList{Tokens: s.p.Tokens.List()}
	if l.Tokens == nil {
		l.Tokens = []Token{}
	}
	return c.reply(http.StatusOK, l)
}

func (s *Server) addToken(c *call) error {
	var b NewToken
	if err := c.decode(&b); err != nil {
		return err
	}
	c.object, c.detail = b.Name, b.Role.String()
	if !tokenName.MatchString(b.Name) {
		return failf(codeInvalidToken, "name is %.64q: it has 1 to 64 letters, digits or any of . _ @ -, and begins with a letter or digit", b.Name)
	}
	life, err := lifetime(codeInvalidToken, "lifetime", b.Lifetime)
	if err != nil {
		return err
	}
	made, secret, err := s.p.Tokens.Add(b.Name, b.Role, life)
	if err != nil {
		return err
	}
	return c.reply(http.StatusCreated, TokenMade{Token: made, Secret: secret})
}

func (s *Server) removeToken(c *call) error {
	if err := s.p.Tokens.Remove(c.path("name")); err != nil {
		return err
	}
	c.w.WriteHeader(http.StatusNoContent)
	return nil
}
